"""Federated rounds: clients train bounded adapters, a server publishes their guarded, noised mean.

What a round is lives here and knows no engine: `FederationPlan` holds what is public, `Federation` the
server's side with its checkpoints, `FederatedClient` the clients'. `nblora.federated.flower` runs it in
Flower (`pip install 'nblora[flower]'`). What is protected, and what not: docs/federated.md.
"""

from nblora.federated.client import (
    FederatedClient,
    Task,
    adapted_model,
    apply_updates,
    base_fingerprint,
    client_updates,
)
from nblora.federated.plan import Budget, FederationPlan, PlannedLayer
from nblora.federated.server import ClientMessage, Federation, Refused, Round
from nblora.federated.updates import Updates, add_updates, pack, unpack

__all__ = [
    "Budget",
    "ClientMessage",
    "FederatedClient",
    "Federation",
    "FederationPlan",
    "PlannedLayer",
    "Refused",
    "Round",
    "Task",
    "Updates",
    "adapted_model",
    "add_updates",
    "apply_updates",
    "base_fingerprint",
    "client_updates",
    "pack",
    "unpack",
]
