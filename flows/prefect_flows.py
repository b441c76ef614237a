"""The flows as Prefect's deployments run them (prefect.yaml). The commands do not import this."""

from __future__ import annotations

from flows import democratize as _democratize
from flows import deploy as _deploy
from flows import promote as _promote
from flows import search as _search
from flows.engine.prefect_flow import to_flow

democratize = to_flow(_democratize.democratize, _democratize.RUN_NAME)
search = to_flow(_search.search, _search.RUN_NAME)
promote = to_flow(_promote.promote, _promote.RUN_NAME)
deploy = to_flow(_deploy.deploy, _deploy.RUN_NAME)
