"""Sampling by vLLM, in this process or on a server, with today's weights sent before every call.

The engine is TRL's VLLMGeneration, which knows vLLM's versions; what differs here is which weights
are sent: those of a model whose LoRA adapters transformers injected, merged one layer at a time.
vLLM samples with its own kernels and dtype, so its log-probs are not those of the training pass.
"""

import torch

from ..config import UserError
from ..packages import missing, package, require_release


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


class VLLMSampler:
    """Samples token lists from the weights that `model` has when `sample` is called.

    ends: ids that end a completion. Raises UserError, one sentence, where vLLM cannot be reached.
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
        try:
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
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"vLLM cannot be used: {reason}.") from error

    def sample(self, prompts, config, greedy):
        """(token lists, lists of their log-probs or None) of one completion per prompt."""
        self.engine.sync_weights()
        for name in (
            "max_completion_length", "temperature", "top_p", "top_k", "repetition_penalty",
        ):
            setattr(self.engine, name, getattr(config, name))
        self.engine.min_p = config.min_p or 0.0
        if greedy:
            self.engine.temperature = 0.0
        _, completions, log_probs, _ = self.engine.generate(prompts, None, num_generations=1)
        return completions, None if greedy else [[step[0] for step in line] for line in log_probs]
