"""Images in prompts: a tiny Qwen3-VL, its own processor of images, and the trainer on both."""

import io

import pytest
import torch
from runs import assert_same, make_trainer, parameters, quick, save_tiny, without_times  # noqa: F401
from vision import CHAT, load_processor, picture, save_qwen3_vl

import rlsd.tasks.data
from rlsd import UserError
from rlsd.config import make_config
from rlsd.policy import checkpoint
from rlsd.policy.checkpoint import load_model, load_tokenizer
from rlsd.policy.models import head_of, sharing
from rlsd.policy.packing import Layout, completion_hidden
from rlsd.sampling.samplers import generate
from rlsd.tasks.data import tokenize_rows
from rlsd.tasks.images import PromptImages
from rlsd_kernels import linear_log_probs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_qwen3_vl(tmp_path_factory.mktemp("qwen3vl"))


def as_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows():
    """One image, none, two (one inside the text), and a large one."""
    chats = [("w1 w2", [picture(1)]), ("w3 w4 w5", None),
             ("w6 <image> w7 <image>", [picture(2), as_bytes(picture(3, 32, 16))]),
             ("w8", [picture(4, 24, 32)])]
    made = []
    for i, (text, images) in enumerate(chats):
        row = {"prompt": [{"role": "user", "content": text}], "solution": "w9",
               "privileged_context": f"w{10 + i} w11", "_source": f"{i} of x"}
        made.append(row | ({"images": images} if images else {}))
    return made


def tokenized(folder, given=None, **options):
    config = make_config({"privileged_template": "w30 {privileged_context} {prompt}", **options})
    return tokenize_rows(
        given or rows(), load_tokenizer(str(folder)), config, need_hint=True,
        processor=load_processor(str(folder)),
    )[0]


def own_logits(model, processor, ids, images):
    """The model's logits of one sequence, with the inputs that its processor makes."""
    extra = {}
    if images is not None:
        extra = dict(processor.image_processor(images=images.images, return_tensors="pt"))
        types = (torch.tensor([ids]) == model.config.image_token_id).long()
        extra["mm_token_type_ids"] = types
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **extra).logits[0]


LAYOUTS = {"padded": {}, "packed": {"padding_free": True}, "shared": {"share_prompts": True}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["prompt_ids", "teacher_prompt_ids"])
def test_log_probs_align_with_the_models_own_logits(folder, which, layout):
    model, processor = load_model(str(folder), "cpu"), load_processor(str(folder))
    given, layer = tokenized(folder), model.get_output_embeddings()
    head_of(model)  # takes it
    given = [given[i] for i in (0, 1, 2, 3, 0, 2, 2)]
    prompts = [row[which] for row in given]
    ids = torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0], [1, 0, 0, 0], [9, 9, 1, 0]])[[0, 1, 2, 3] * 2]
    mask = torch.tensor([[t < n for t in range(4)] for n in (4, 2, 1, 3, 4, 2, 1)])
    ids, images = ids[:7], [row.get("_images") for row in given]
    layout = Layout(0, image_token_id=model.config.image_token_id, **LAYOUTS[layout])
    if layout.share_prompts:
        assert sharing(model, layout, "true") == layout
    with torch.no_grad():
        hidden = completion_hidden(model, prompts, ids, mask, layout, images=images)
        got = linear_log_probs(hidden, layer.weight, ids)
        without = completion_hidden(model, prompts[:1], ids[:1], mask[:1], layout)
    for i, prompt in enumerate(prompts):
        y = ids[i][mask[i]]
        logits = own_logits(model, processor, [*prompt, *y.tolist()], images[i])
        want = logits[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(y)), y]
        torch.testing.assert_close(got[i][mask[i]], want, atol=1e-4, rtol=0)
    assert (hidden[0] - without[0]).abs().max() > 1e-2  # the picture matters


def test_a_groups_image_passes_the_tower_once_with_exact_gradients(folder):
    given = [tokenized(folder)[i] for i in (0, 2)]
    given = [given[i] for i in (0, 0, 1, 1, 1)]
    ids = torch.randint(4, 40, (5, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 4, 1])[:, None]
    found = []
    for share in (False, True):
        model, patches = load_model(str(folder), "cpu"), []
        model.base_model.visual.register_forward_hook(
            lambda module, args, out, patches=patches: patches.append(len(args[0]))
        )
        hidden = completion_hidden(
            model, [row["prompt_ids"] for row in given], ids, mask,
            Layout(0, image_token_id=model.config.image_token_id, share_prompts=share),
            images=[row["_images"] for row in given],
        )
        hidden[mask].square().mul(torch.linspace(-1, 1, 32)).sum().backward()
        found.append((patches, {n: p.grad for n, p in model.named_parameters()}))
    (alone, want), (once, got) = found
    one, two = (sum(p.shape[0] for n, p in row["_images"].pixels().items() if "pixel" in n)
                for row in (given[0], given[2]))
    assert (alone, once) == ([2 * one + 3 * two], [one + two])
    norm = sum(g.norm() ** 2 for g in want.values()) ** 0.5
    assert sum((got[n] - g).norm() ** 2 for n, g in want.items()) ** 0.5 < 1e-5 * norm
    assert sum(g.norm() > 1e-3 for n, g in want.items() if "visual" in n) > 10


def test_prompts_hold_the_placeholders_where_they_belong(folder):
    tokenizer, given = load_tokenizer(str(folder)), tokenized(folder)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = [row["prompt_ids"].count(image) for row in given]
    grids = [row["_images"].pixels()["image_grid_thw"].prod(1).sum() // 4
             if "_images" in row else 0 for row in given]
    assert counts == [int(n) for n in grids] and counts[0] > 1 and counts[1] == 0
    for row in given:  # the teacher's is the student's with the hint inserted
        assert row["teacher_prompt_ids"].count(image) == row["prompt_ids"].count(image)
        assert len(row["teacher_prompt_ids"]) == len(row["prompt_ids"]) + 3
    text = tokenizer.decode(given[2]["prompt_ids"])
    assert text.index("w6") < text.index("<|vision_start|>") < text.index("w7")


def test_greedy_completions_follow_the_models_own_logits(folder):
    model, processor = load_model(str(folder), "cpu"), load_processor(str(folder))
    tokenizer, given = load_tokenizer(str(folder)), tokenized(folder)
    config = make_config({"max_completion_length": 4})
    images = [row.get("_images") for row in given]
    ids, mask, _, _ = generate(
        model, tokenizer, [row["prompt_ids"] for row in given], config, images=images, greedy=True
    )
    banned = [model.config.image_token_id, model.config.video_token_id]
    for row, line, keep in zip(given, ids, mask, strict=True):
        sequence = list(row["prompt_ids"])
        for y in line[keep].tolist():
            logits = own_logits(model, processor, sequence, row.get("_images"))[-1]
            logits[banned] = -torch.inf
            assert y == logits.argmax()
            sequence.append(y)


def test_images_train_packed_or_padded_full_or_lora_and_resume(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_processor", load_processor)
    pool = [(f"{i} of x", {k: v for k, v in row.items() if k[0] != "_"})
            for i, row in enumerate(rows() * 2)]
    for i, (_, row) in enumerate(pool):
        row["prompt"] = [{"role": "user", "content": f"w{i} {row['prompt'][0]['content']}"}]
    monkeypatch.setattr(rlsd.tasks.data, "_read_jsonl", lambda path: pool)
    common = {
        "model_name_or_path": str(folder), "train_dataset": "pictures.jsonl", "eval_size": 2,
        "privileged_template": "w30 {privileged_context} {prompt}", "max_steps": 2,
        "save_steps": 1, "eval_steps": 2, "per_device_train_batch_size": 5, "beta": 0.1,
    }
    for lora in (False, True):
        final = []
        for packed, share in ((False, "false"), (False, "true"), (True, "auto")):
            trainer = make_trainer(
                tmp_path, output_dir=str(tmp_path / f"{lora}{share}"), padding_free=packed,
                share_prompts=share, use_peft=lora, lora_r=2, learning_rate=1e-3, **common,
            )
            start = parameters(trainer.model)
            records = trainer.train()
            final.append(parameters(trainer.model))
            assert (records[1]["prompt_sharing/tokens_saved"] > 0) == (share == "true") or packed
        moved = max((final[0][n] - start[n]).abs().max() for n in start)
        assert moved > 1e-4 and 0 < records[1]["loss"] ** 2
        apart = max((final[0][n] - final[1][n]).abs().max() for n in start)
        assert apart < 0.05 * moved  # Adam makes a step of what is rounding in a small gradient
        resumed = make_trainer(
            tmp_path, output_dir=str(tmp_path / f"{lora}{share}"), padding_free=packed,
            share_prompts=share, use_peft=lora, lora_r=2, learning_rate=1e-3, **common,
            resume_from=tmp_path / f"{lora}{share}" / "checkpoint-1",
        )
        assert without_times(resumed.train()) == without_times(records)
        assert_same(parameters(resumed.model), final[2])


def test_template_options_reach_prompts_with_images(folder):
    given = rows()[:2]
    given[0]["chat_template_kwargs"] = {"ending": "w20"}
    processor = load_processor(str(folder))
    processor.chat_template = processor.tokenizer.chat_template = CHAT + "{{ ending }}"
    config = make_config({
        "privileged_template": "w30 {privileged_context} {prompt}",
        "chat_template_kwargs": {"ending": "w21"},
    })
    made, _ = tokenize_rows(
        given, processor.tokenizer, config, need_hint=True, processor=processor
    )
    ends = [[processor.tokenizer.decode(row[name][-1]) for row in made]
            for name in ("prompt_ids", "teacher_prompt_ids")]
    assert ends == [["w20", "w21"]] * 2
    processor.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="^Row 0 of x cannot be used: its chat template fails"):
        tokenize_rows(given, processor.tokenizer, config, need_hint=True, processor=processor)


def test_images_for_a_text_model_are_refused(folder):
    with pytest.raises(UserError, match="^Row 0 of x has images, but the model takes none\\.$"):
        tokenize_rows(rows(), load_tokenizer(str(folder)), make_config({}), need_hint=True)


@pytest.mark.parametrize("bad, words", [
    ({"bytes": b"nonsense", "path": None}, "its image cannot be opened"),
    ("/nonesuch.png", "No such file"), ({"path": None}, "its image cannot be opened"),
    (3, "its image cannot be opened"),
])
def test_a_broken_image_names_its_row(folder, bad, words):
    given = rows()
    given[3]["images"] = [bad]
    with pytest.raises(UserError, match=f"^Row 3 of x cannot be used: .*{words}.*\\.$"):
        tokenized(folder, given)


def test_placeholders_and_images_must_agree(folder):
    given = rows()
    given[2]["images"] = given[2]["images"][:1]
    with pytest.raises(UserError, match="Row 2 of x .*has 1 images, but its text says <image> 2"):
        tokenized(folder, given)


def test_one_image_may_stand_alone(folder):
    processor = load_processor(str(folder))
    one, many = PromptImages({"image": picture(1)}, processor), PromptImages(
        {"images": [picture(1)]}, processor
    )
    prompt = [{"role": "user", "content": "w1"}]
    assert one.encode(prompt) == many.encode(prompt)


def test_a_processor_is_loaded_for_models_with_a_vision_tower_alone(folder, tmp_path):
    assert checkpoint.load_processor(save_tiny(tmp_path / "model")) is None
    with pytest.raises(UserError, match="its processor of images"):  # it holds none
        checkpoint.load_processor(str(folder))
