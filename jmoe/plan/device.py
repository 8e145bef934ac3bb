"""GPUs, described for a compiler that can't ask them.

The description is XLA's `GpuTargetConfigProto`, as text. What it says of speeds steers
the scheduler and nothing else; what it says of sizes bounds kernels. Figures are those
of the data sheets and, for what all GPUs of a generation share, of CUDA's programming
guide (compute capability 9.0).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A Hopper GPU: name, cores (SMs), and memory in bytes and bytes a second.

    bfloat16_flops: dense products' operations a second.
    """

    name: str
    cores: int
    memory_bytes: int
    memory_bandwidth: int
    cache_bytes: int  # L2
    bfloat16_flops: int

    @property
    def target_config(self) -> str:
        """What XLA compiles for."""
        return _HOPPER.format(**dataclasses.asdict(self))


# 96 GB as the maker counts them. The GPU shows somewhat more, which CUDA's context and
# the buffers of NCCL need.
H20 = Device(
    name="NVIDIA H20",
    cores=78,
    memory_bytes=96 * 10**9,
    memory_bandwidth=4 * 10**12,
    cache_bytes=60 * 2**20,
    bfloat16_flops=148 * 10**12,
)

_HOPPER = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: {cache_bytes}
  memory_bandwidth: {memory_bandwidth}
  device_memory_size: {memory_bytes}
  pcie_bandwidth: 34359738368
  device_address_bits: 64
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
