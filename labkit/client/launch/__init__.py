"""Start, watch and stop a service from a notebook or a script. No torch.

The service is a process of its own: the kernel never holds the model.

from labkit import launch

service = launch.start("pocket", plan="int8")
service.base_url  # "http://127.0.0.1:8000/v1"
service.stop()
"""

from labkit.client.launch.start import Service, find, script, start
from labkit.client.launch.state import State
from labkit.common.errors import LaunchError

__all__ = ["LaunchError", "Service", "State", "find", "script", "start"]
