"""Resources as protobuf and back."""

from __future__ import annotations

from cortex_common.pb.v1 import common_pb2
from cortex_common.telemetry.resources import Gpu, Resources


def resources_to_proto(resources: Resources) -> common_pb2.Resources:
    """For a heartbeat."""
    return common_pb2.Resources(
        cpu_cores=resources.cpu_cores,
        cpu_utilisation=resources.cpu_utilisation,
        memory_bytes=resources.memory_bytes,
        memory_available_bytes=resources.memory_available_bytes,
        disk_free_bytes=resources.disk_free_bytes,
        network_sent_bytes=resources.network_sent_bytes,
        network_received_bytes=resources.network_received_bytes,
        gpus=[
            common_pb2.Gpu(
                name=gpu.name,
                memory_bytes=gpu.memory_bytes,
                memory_used_bytes=gpu.memory_used_bytes,
                utilisation=gpu.utilisation,
            )
            for gpu in resources.gpus
        ],
        slots=resources.slots,
        free_slots=resources.free_slots,
    )


def resources_from_proto(message: common_pb2.Resources) -> Resources:
    """From a heartbeat."""
    return Resources(
        cpu_cores=message.cpu_cores,
        cpu_utilisation=message.cpu_utilisation,
        memory_bytes=message.memory_bytes,
        memory_available_bytes=message.memory_available_bytes,
        disk_free_bytes=message.disk_free_bytes,
        network_sent_bytes=message.network_sent_bytes,
        network_received_bytes=message.network_received_bytes,
        gpus=tuple(Gpu(gpu.name, gpu.memory_bytes, gpu.memory_used_bytes, gpu.utilisation) for gpu in message.gpus),
        slots=message.slots,
        free_slots=message.free_slots,
    )
