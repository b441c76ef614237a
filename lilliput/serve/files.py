"""The files of a deployment folder. Imports nothing: commands that only look at a gateway start at once.

deployments/<device>/
├── current.json, previous.json   the current and the previous deployment
├── models/<sha256>/              the compiled models of both, verified
├── routers/<sha256>/             the fitted routers of both
├── answers.db                    the answer cache, which survives restarts
├── admin-token                   allows a process to replace the served champion
├── gateway.json, gateway.log     the gateway's process
└── gateway.lock                  held by that process: a folder has one gateway
"""

CURRENT, PREVIOUS, MODELS, ROUTERS = "current.json", "previous.json", "models", "routers"
ANSWERS, ADMIN_TOKEN, GATEWAY = "answers.db", "admin-token", "gateway.json"
PROXY_HELP = "address of a reverse proxy before the gateway (repeatable); a token in LILLIPUT_TOKEN is required"
