"""Models: where weights come from, and which module plays which role.

``ModelSpec`` says where a model lives, ``families`` translate module names into roles.
The embedded pocket model is in ``labkit.models.pocket``.
"""

from labkit.models.families import FAMILIES, ROLES, Family, family_of, find_roles
from labkit.models.spec import ModelSpec, get_spec, list_models

__all__ = [
    "FAMILIES",
    "ROLES",
    "Family",
    "ModelSpec",
    "family_of",
    "find_roles",
    "get_spec",
    "list_models",
]
