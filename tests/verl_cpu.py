"""verl on a CPU: VERL_USE_EXTERNAL_MODULES=verl_cpu makes one a platform, before verl asks which it is on."""

import contextlib
import os
from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # verl has one FSDP engine, registered for GPUs
NOTHING = SimpleNamespace(
    memory_allocated=lambda *_: 0, max_memory_allocated=lambda *_: 0, memory_reserved=lambda *_: 0,
    max_memory_reserved=lambda *_: 0, mem_get_info=lambda *_: (1, 1), empty_cache=lambda: None,
    reset_peak_memory_stats=lambda *_: None, ipc_collect=lambda: None,
)  # fmt: skip
for name, function in vars(NOTHING).items():
    if not hasattr(torch.cpu, name):
        setattr(torch.cpu, name, function)


@PlatformRegistry.register("cpu")
class CPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = torch.cpu
    is_available = is_ipc_supported = lambda self: True
    current_device = lambda self: torch.device("cpu")  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    set_device = set_allocator_settings = lambda self, _: None
    synchronize = lambda self, _=None: None  # noqa: E731
    manual_seed = manual_seed_all = lambda self, seed: torch.manual_seed(seed)
    empty_cache = profiler_start = profiler_stop = cudart = lambda self: None
    get_device_capability = lambda self, _=0: (None, None)  # noqa: E731
    communication_backend_name = lambda self: "gloo"  # noqa: E731
    visible_devices_envvar = lambda self: "CPU_VISIBLE_DEVICES"  # noqa: E731
    ray_resource_name = lambda self: "CPU"  # noqa: E731
    ray_noset_envvars = lambda self: []  # noqa: E731
    nvtx_range = lambda self, _: contextlib.nullcontext()  # noqa: E731


set_platform(CPU())
