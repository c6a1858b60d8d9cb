"""A CPU as a platform of verl's plugin interface, so that its FSDP engine runs without a GPU."""

import contextlib
import types

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

MEMORY = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One device, no memory statistics, gloo."""

    device_name = vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        **vars(torch.cpu), **{name: lambda *args: 0 for name in MEMORY},
        mem_get_info=lambda *args: (0, 0), get_device_name=lambda *args: "cpu",
    )

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None
