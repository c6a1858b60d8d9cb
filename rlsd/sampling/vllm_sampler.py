"""Sampling by vLLM, in this process or on a server, with today's weights sent before every call.

The engine is TRL's VLLMGeneration, which knows vLLM's versions; what differs here is which weights
are sent: those of a model whose LoRA adapters transformers injected, merged one layer at a time.
vLLM samples with its own kernels and dtype, so its log-probs are not those of the training pass.
Weights that did not arrive make no noise either, so samplers.py holds a few log-probs against the
model's after every transfer, and at the start those of weights that are all changed (`halved`).
"""

import contextlib
import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..config import UserError
from ..packages import missing, package, require_release
from ..policy.gguf_file import is_gguf


@torch.no_grad()
def merged_weights(model):
    """(name, weight) of every parameter of the model without its adapters, the active ones added.

    W + s B A in fp32, rounded once to the dtype of W; the model itself is not touched, since
    merging in place and back would round bf16 weights a little further at every step.
    """
    layers = dict(model.named_modules()) if getattr(model, "peft_config", None) else {}
    for name, p in model.named_parameters():
        owner, is_wrapped, own = name.rpartition(".base_layer.")
        if ".lora_" in name and layers:
            continue
        if is_wrapped:
            name = f"{owner}.{own}"
            if own == "weight":
                layer = layers[owner]
                added = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                p = (p.float() + added.float()).to(p.dtype)
        yield name, p.detach()


@contextlib.contextmanager
@torch.no_grad()
def halved(model):
    """Every weight half as large: all log-probs move, and it is undone to the bit."""
    for p in model.parameters():
        p.mul_(0.5)
    try:
        yield
    finally:
        for p in model.parameters():
            p.mul_(2)


@contextlib.contextmanager
def _sentences(doing):
    """What vLLM and TRL raise, a plain Exception where a request fails, as a UserError."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):  # the trainer says what to lower
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if not reason or isinstance(error, AttributeError | LookupError | TypeError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"vLLM cannot {doing}: {reason}.") from error


@contextlib.contextmanager
def _loadable(model, tokenizer, path):
    """The model has a folder that vLLM reads: its own, or a passing copy of what a .gguf file held.
    """
    own = model.name_or_path
    if not is_gguf(path) or Path(own).is_dir():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], model.dtype
        for part in (config, model.generation_config, tokenizer):
            part.save_pretrained(folder)
        weights = {name: w.contiguous() for name, w in merged_weights(model)}
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        model.name_or_path = folder
        try:
            yield
        finally:
            model.name_or_path = own


@contextlib.contextmanager
def _plain_linears():
    """On a CPU vLLM would pack the weights of its linear layers for oneDNN and drop them, or keep
    both for a tied head: later weights are refused there, and ignored here."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    packing, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


class VLLMSampler:
    """Samples token lists inside `synced()`, from the weights that `model` had when it began.

    ends: ids that end a completion. Raises UserError, one sentence, where vLLM cannot be reached,
    takes no weights or does not sample.
    """

    def __init__(self, model, tokenizer, config, ends):
        for name in missing(("trl", "vllm")):
            raise UserError(f"use_vllm needs {package(name)}.")
        require_release("trl")
        from accelerate import Accelerator
        from trl.generation.vllm_generation import VLLMGeneration

        class Generation(VLLMGeneration):
            """TRL's, with our names and merged weights."""

            def _iter_named_params(self):
                return merged_weights(self.model)

        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise UserError(
                "use_vllm samples for one training process; start training without a launcher, or "
                "set use_vllm to false."
            )
        source = config.model_name_or_path
        with _sentences("be used"), _loadable(model, tokenizer, source), _plain_linears():
            self.engine = Generation(
                model, accelerator, tokenizer, mode=config.vllm_mode,
                server_base_url=config.vllm_server_base_url, server_host=config.vllm_server_host,
                server_port=config.vllm_server_port, server_timeout=config.vllm_server_timeout,
                group_port=config.vllm_group_port,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                max_model_length=config.vllm_max_model_length,
                max_num_seqs=config.rollout_batch_size,
                enable_sleep_mode=config.vllm_enable_sleep_mode,
                max_completion_length=config.max_completion_length,
                generation_kwargs={"stop_token_ids": ends},
            )

    @contextlib.contextmanager
    def synced(self):
        """vLLM has the model's weights of now, and its memory until the end."""
        engine = self.engine
        with _sentences("take the weights"):
            engine.sync_weights()
            # TRL would lose them after every call, the check's too.
            sleeps = engine.mode == "colocate" and engine.enable_sleep_mode
            if sleeps:
                engine.llm.wake_up(tags=["kv_cache"])
                engine.enable_sleep_mode = False
        try:
            yield
        finally:
            if sleeps:
                engine.enable_sleep_mode = True
                with _sentences("sleep"):
                    engine.llm.sleep(level=2)

    def sample(self, prompts, config, greedy):
        """(token lists, lists of their log-probs or None) of one completion per prompt."""
        for name in (
            "max_completion_length", "temperature", "top_p", "top_k", "repetition_penalty",
        ):
            setattr(self.engine, name, getattr(config, name))
        self.engine.min_p = config.min_p or 0.0
        if greedy:
            self.engine.temperature = 0.0
        with _sentences("sample"):
            _, completions, log_probs, _ = self.engine.generate(prompts, None, num_generations=1)
        return completions, None if greedy else [[step[0] for step in line] for line in log_probs]
