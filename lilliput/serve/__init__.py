"""The HTTP gateway: routes chat requests to the device, the edge server or the answer cache."""
