"""The properties of a GPU on which a plan depends."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .cuda_memory import probe


@dataclass(frozen=True)
class GpuFacts:
    """One GPU.

    name: such as "NVIDIA H200". architecture: such as "sm_90". sms: multiprocessors. cuda: version of its driver.
    """

    name: str
    architecture: str
    sms: int
    cuda: str

    def as_json(self) -> dict[str, str | int]:
        return asdict(self)


def gpu_bytes(ordinal: int = 0) -> int:
    """The memory of one GPU. Raises BackendError, with what to do, where there is no such GPU."""
    probe(ordinal)
    from cuda.bindings import driver

    _, device = driver.cuDeviceGet(ordinal)
    _, nbytes = driver.cuDeviceTotalMem(device)
    return int(nbytes)


def gpu_facts(ordinal: int = 0) -> GpuFacts:
    """The facts of one GPU, from its driver. Raises BackendError, with what to do, where there is no such GPU."""
    cuda = probe(ordinal)
    from cuda.bindings import driver

    attributes = driver.CUdevice_attribute
    _, device = driver.cuDeviceGet(ordinal)
    major, minor, sms = (
        driver.cuDeviceGetAttribute(attribute, device)[1]
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    _, name = driver.cuDeviceGetName(128, device)
    return GpuFacts(name.split(b"\0")[0].decode(), f"sm_{major}{minor}", sms, cuda)
