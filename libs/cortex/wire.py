"""Nodes from protobuf: with the job's wire module, all the SDK knows of messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cortex.views import (
    DatasetView,
    GpuView,
    IdentitiesView,
    IdentityView,
    KeyEpochView,
    NodeView,
    OpenTokenView,
    ResourcesView,
    SealedDatasetView,
)
from cortex_common.identity import Identity
from cortex_common.job.wire import moment
from cortex_common.pb.v1 import common_pb2, coordinator_pb2, identity_pb2


def node_from_proto(message: common_pb2.Node) -> NodeView:
    """Read a node."""
    return NodeView(
        name=message.name,
        role=_word(common_pb2.Role.Name, message.role, "ROLE_"),
        region=message.region,
        health=_word(common_pb2.NodeHealth.Name, message.health, "NODE_HEALTH_"),
        address=message.address or None,
        activity=message.activity,
        version=message.version,
        resources=resources_from_proto(message.resources),
        datasets=tuple(
            DatasetView(name=d.name, input_shape=tuple(d.input_shape), classes=d.classes, examples=d.examples)
            for d in message.datasets
        ),
        started_at=moment(message, "started_at"),
        last_seen_at=moment(message, "last_seen_at"),
        lease_left_s=message.lease_left_s,
    )


def resources_from_proto(message: common_pb2.Resources) -> ResourcesView:
    """Read resources."""
    return ResourcesView(
        cpu_cores=message.cpu_cores,
        cpu_utilisation=message.cpu_utilisation,
        memory_bytes=message.memory_bytes,
        memory_available_bytes=message.memory_available_bytes,
        disk_free_bytes=message.disk_free_bytes,
        network_sent_bytes=message.network_sent_bytes,
        network_received_bytes=message.network_received_bytes,
        gpus=tuple(
            GpuView(
                name=gpu.name,
                memory_bytes=gpu.memory_bytes,
                memory_used_bytes=gpu.memory_used_bytes,
                utilisation=gpu.utilisation,
            )
            for gpu in message.gpus
        ),
        slots=message.slots,
        free_slots=message.free_slots,
    )


def key_epoch_from_proto(message: coordinator_pb2.KeyEpoch) -> KeyEpochView:
    """Read a key epoch."""
    return KeyEpochView(
        job_id=message.job_id,
        epoch=message.epoch,
        key_id=message.key_id,
        kek_id=message.kek_id,
        created_at=moment(message, "created_at"),
        reason=message.reason,
        from_round=message.from_round,
        state=_word(coordinator_pb2.KeyState.Name, message.state, "KEY_STATE_"),
    )


def dataset_from_proto(message: coordinator_pb2.SealedDataset) -> SealedDatasetView:
    """Read a sealed data set."""
    # numpy is not for those who only ask how a job is.
    from cortex_common.data.sealed import described

    manifest = described(message.manifest).manifest
    return SealedDatasetView(
        reference=message.reference,
        org=message.org,
        added_by=message.added_by,
        added_at=moment(message, "added_at"),
        signer=manifest.signer,
        input_shape=manifest.input_shape,
        classes=manifest.classes,
        examples=manifest.examples,
        shards=len(manifest.shards),
    )


def identities_from_proto(message: identity_pb2.ListIdentitiesResponse) -> IdentitiesView:
    """Read who belongs to the network."""
    return IdentitiesView(
        identities=tuple(_identity(each) for each in message.identities),
        tokens=tuple(
            OpenTokenView(
                token_id=each.token_id,
                identity=each.identity,
                region=each.region,
                expires_at=moment(each, "expires_at"),
            )
            for each in message.tokens
        ),
    )


def _identity(message: identity_pb2.IssuedIdentity) -> IdentityView:
    who = Identity.parse(message.identity)
    return IdentityView(
        identity=message.identity,
        role=who.role.value,
        name=who.name,
        region=message.region,
        serial=message.serial,
        live_certificates=message.live_certificates,
        issued_at=moment(message, "issued_at"),
        expires_at=moment(message, "expires_at"),
        revoked_at=moment(message, "revoked_at"),
        revoked_reason=message.revoked_reason,
    )


def _word(name_of: Callable[[Any], str], number: int, prefix: str) -> str:
    """What an enumeration calls a number; `unknown` where only a newer version has a name for it."""
    try:
        return name_of(number).removeprefix(prefix).lower()
    except ValueError:
        return "unknown"
