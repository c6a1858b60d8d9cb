"""Several processes as one run: who samples what, and sums of losses and gradients over all.

Every process holds the whole rollout, so that advantages, aggregation weights and micro-batches are
those of one process. Process r of n samples its share of the rows and runs the micro-batches
r, r + n, ..; the sums over processes are the loss and the gradient. Replicated (DDP): the weights
are whole everywhere, and gradients are summed in fp32, once per optimizer step. Sharded (FSDP2, by
accelerate): the same passes inside forward, where the weights are gathered layer by layer.
"""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import UserError


def _told(variable):
    return os.environ.get(variable, "false").lower() in ("true", "1")


# How the backends say that another process is gone: gloo, then NCCL.
LOST = ("closed by peer", "reset by peer", "Connection refused", "ncclRemoteError")


class Processes:
    """The processes of a run, as `accelerate launch` or `torchrun` started them; one without.

    rank: this one, 0 is the main one that writes; size: how many; sharded: FSDP2.
    """

    def __init__(self, config):
        self.rank, self.size, self.accelerator = 0, 1, None
        self.sharded = _told("ACCELERATE_USE_FSDP")
        deepspeed = _told("ACCELERATE_USE_DEEPSPEED")
        if not self.sharded and not deepspeed and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs

        self._require_honourable(config)
        on_cpu, started = config.device.startswith("cpu"), int(os.environ.get("WORLD_SIZE", 1))
        # The others wait while one writes a checkpoint or samples longer.
        waiting = InitProcessGroupKwargs(backend=None, timeout=timedelta(hours=6))
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[waiting])
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        if self.size != started:
            raise UserError(
                f"{started} processes were started, but accelerate sees {self.size}, as where no "
                "GPU is visible; set device to cpu, or start one process."
            )
        if self.accelerator.mixed_precision != "no":
            raise UserError(
                f"mixed_precision is {self.accelerator.mixed_precision!r} in the configuration of "
                "accelerate; set it to no there, and bf16 here."
            )
        if self.sharded:
            plugin = FullyShardedDataParallelPlugin(
                mixed_precision_policy=MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                    cast_forward_inputs=False,  # rotary positions come in fp32 and stay so
                ) if config.bf16 else None,
                cpu_ram_efficient_loading=False,  # every process verifies the model that it loads
            )
            self.accelerator.state.fsdp_plugin = plugin

    def _require_honourable(self, config):
        """Refuse what the launcher was told and this trainer would not do."""
        on_cpu = config.device.startswith("cpu")
        for applies, sentence in (
            (_told("ACCELERATE_USE_DEEPSPEED"), "DeepSpeed's engine owns the optimizer that the "
             "trainer steps; shard with FSDP2 instead: accelerate launch --config_file "
             "configs/accelerate/fsdp2.yaml."),
            (self.sharded and config.method.distils, f"Objective {config.objective} "
             "compares whole distributions, for which FSDP2 does not gather the teacher's head; "
             "use configs/accelerate/ddp.yaml."),
            (self.sharded and _told("FSDP_OFFLOAD_PARAMS"),
             "fsdp_offload_params keeps weights where no pass runs; set it to false."),
            (self.sharded and _told("FSDP_ACTIVATION_CHECKPOINTING"),
             "Set gradient_checkpointing here instead of fsdp_activation_checkpointing."),
            (self.sharded and on_cpu and torch.cuda.is_available(),
             "FSDP2 shards over this machine's GPUs, so device cannot be cpu; leave it out."),
            (self.sharded and os.environ.get("FSDP_VERSION", "1") != "2",
             "FSDP 1 is not supported; set fsdp_version: 2."),
            (":" in config.device, f"device {config.device} is one GPU for all processes; leave it "
             "out, so that each takes its own."),
        ):
            if applies:
                raise UserError(sentence)

    def __str__(self):
        how = "sharded by FSDP2" if self.sharded else "replicated"
        return f", on {self.size} processes, {how}" if self.accelerator else ""

    @property
    def main(self):
        return self.rank == 0

    def require_room_for(self, questions, rows):
        """Every process samples whole groups, and shards of every weight are asked for at once."""
        if questions % self.size:
            raise UserError(
                f"{questions} questions per rollout step cannot be shared by {self.size} processes "
                "in whole groups; make generation_batch_size a multiple of num_generations times "
                f"{self.size}."
            )
        pictures = sum("_images" in row for row in rows)
        if self.sharded and 0 < pictures < len(rows):
            raise UserError(
                f"{pictures} of {len(rows)} rows have images; under FSDP2 all or none may, because "
                "processes without one would not gather the weights of the vision tower."
            )

    @contextlib.contextmanager
    def united(self, standing):
        """The end of another process, as a sentence; standing(): what is safe on disk."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(sign in str(error) for sign in LOST):
                raise
            raise UserError(
                f"Another process of the run has ended, so this one stopped too; {standing()}."
            ) from error

    def everywhere(self, function):
        """[function() of every process], by rank; what one raises, all raise."""
        if self.size == 1:
            return [function()]
        try:
            mine = function(), None
        except Exception as error:  # a process that left alone would let the others wait for ever
            mine = None, error
        results = [None] * self.size
        dist.all_gather_object(results, mine)
        for _, error in results:
            if error is not None:
                raise error
        return [value for value, _ in results]

    def told(self, error):
        """The error, which all other processes raise where they wait in `everywhere`."""
        if self.size > 1:
            dist.all_gather_object([None] * self.size, (None, error))
        return error

    def once(self, function):
        """function() of the main process alone, in all."""
        return self.everywhere(lambda: function() if self.main else None)[0]

    def joined(self, stats):
        """The dicts of tensors of all processes in one list; from others they come on the CPU."""
        if self.size == 1:
            return stats
        mine = [{name: value.cpu() for name, value in part.items()} for part in stats]
        return [part for parts in self.everywhere(lambda: mine) for part in parts]

    def share(self, items):
        """This process's share of a list, equally long in all: a contiguous part, filled up."""
        each = -(-len(items) // self.size)
        mine = items[self.rank * each : (self.rank + 1) * each]
        return mine + items[-1:] * (each - len(mine))

    def deal(self, parts):
        """This process's micro-batches; sharded, as many as any other has, filled up with []."""
        mine = parts[self.rank :: self.size]
        most = -(-len(parts) // self.size)
        return mine + [[]] * (most - len(mine) if self.sharded else 0)

    def sum_(self, *tensors):
        """Each tensor becomes its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_gradients(self, parameters):
        """Replicated: gradients become sums over processes; one that no process has stays None."""
        if self.size == 1 or self.sharded:
            return
        present = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.float32, device=self.device
        )
        self.sum_(present)
        for p, anywhere in zip(parameters, present.tolist(), strict=True):
            if anywhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.sum_(p.grad)

    @property
    def device(self):
        return self.accelerator.device

    def loss_scale(self):
        """What makes the mean that FSDP2 takes of gradients their sum."""
        return self.size if self.sharded else 1

    def shard(self, model):
        """The model, its weights spread over all processes if the run is sharded."""
        if not self.sharded:
            return model
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        model = fsdp2_prepare_model(self.accelerator, model)
        # Whole weights that outlived a pass would go stale when their shards are written.
        model.set_reshard_after_forward(True)
        return model

    @contextlib.contextmanager
    def gathered(self, model):
        """Whole weights on every process, for many passes without gradients that differ."""
        parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()


def whole(value, *, keep=True):
    """The value with every sharded tensor in it whole, on the CPU.

    keep: whether this process wants the result, of which it otherwise gets None for each.
    """
    if isinstance(value, dict):
        return {name: whole(item, keep=keep) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole(item, keep=keep) for item in value]
    if not isinstance(value, DTensor):
        return value
    full = value.detach().full_tensor()  # all take part
    return full.cpu() if keep else None


def whole_weights(model, *, keep=True):
    """{name: whole weight} as the model's files hold them; tied names share one tensor."""
    owners = dict(model.named_parameters(remove_duplicate=False))
    state, made = model.state_dict(), {}
    for name, value in state.items():
        owner = id(owners.get(name, value))
        if owner not in made:
            made[owner] = whole(value, keep=keep)
        state[name] = made[owner]
    return dict(state)


def placed(value, like):
    """A whole tensor, sharded as `like` is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
