"""The files that `minicpm` exports carry, run by transformers as the model card tells its readers to.

The folder is written by hand here: what is held is the remote code and not the exporter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from minicpm.architecture import ModelConfig, RopeScaling
from minicpm.exchange import remote_code
from minicpm.model import MiniCPM, initialize

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("remote_modules")

QUESTION = "山东省最高的山是哪座山, 它比黄山高还是矮?差距多少?"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
TOLERANCE = 1e-5
REAL_TOKENIZER = Path(__file__).parents[2] / "../shared/tokenizers/minicpm-1b.json"


def train_tokenizer() -> Tokenizer:
    """A byte-fallback BPE of the MiniCPM layout: `▁` before the text, `<s>` in front, one leading space stripped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials + [f"<0x{b:02X}>" for b in range(256)])
    tokenizer.train_from_iterator([QUESTION, "<用户>你好<AI>", "泰山 is the highest"] * 3, trainer)
    # The byte pieces are plain vocabulary: as added tokens they would be matched in text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_folder(folder: Path, model: MiniCPM, **changes: Any) -> Path:
    config = model.config
    folder.mkdir()
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "scale_emb",
        "scale_depth",
        "dim_model_base",
        "initializer_range",
        "bos_token_id",
    ]
    settings = {name: getattr(config, name) for name in names} | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "auto_map": dict(remote_code.AUTO_MAP),
        "eos_token_id": 2,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    if not config.tie_word_embeddings:
        settings["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(settings | changes))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    for name, content in remote_code.read_files().items():
        (folder / name).write_bytes(content)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings))
    return folder


@pytest.fixture
def model(tiny_config: ModelConfig) -> MiniCPM:
    return initialize(MiniCPM(tiny_config), seed=7)


@pytest.fixture
def folder(tmp_path: Path, model: MiniCPM) -> Path:
    return write_folder(tmp_path / "tiny-export", model)


def open_network(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, trust_remote_code=True
    ).eval()


def open_folder(folder: Path) -> tuple[Any, Any]:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True), open_network(folder)


def seeded_ids(config: ModelConfig, batch: int = 7, length: int = 11) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_cards_snippet_runs_as_it_stands(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)

    path = str(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, torch_dtype=torch.bfloat16, device_map="cpu", trust_remote_code=True
    )

    response, history = model.chat(tokenizer, QUESTION, temperature=0.8, top_p=0.8, max_length=200)
    assert model.dtype == torch.bfloat16
    assert isinstance(response, str)
    assert history == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": response}]


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_equal_the_torch_models(tmp_path: Path, tiny_config: ModelConfig, is_tied: bool) -> None:
    config = tiny_config.replace(tie_word_embeddings=is_tied)
    model = initialize(MiniCPM(config), seed=7)
    network = open_network(write_folder(tmp_path / f"parity-{is_tied}", model))
    assert network.config.tie_word_embeddings is is_tied
    ids = seeded_ids(config)
    with torch.no_grad():
        assert (network(ids).logits - model(ids)).abs().max() <= TOLERANCE
        assert network(ids, logits_to_keep=2).logits.shape == (7, 2, 331)
        cached = network(ids[:, :6])
        rest = network(ids[:, 6:], past_key_values=cached.past_key_values).logits
        assert (rest - model(ids)[:, 6:]).abs().max() <= TOLERANCE


def test_missing_keys_mean_what_published_files_mean(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    assert not {"rope_theta", "tie_word_embeddings", "rope_scaling"} & written.keys()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.rope_parameters["rope_theta"], config.tie_word_embeddings) == (10000.0, True)


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0)),
        ({"rope_type": "ntk_by_parts", "factor": 4.0}, RopeScaling("ntk_by_parts", 4.0)),
        (
            {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            RopeScaling("llama3", 4.0, None, 1.0, 4.0),
        ),
    ],
    ids=lambda value: value.get("rope_type", "type") if isinstance(value, dict) else "",
)
def test_rope_scalings_and_saving_again(
    tmp_path: Path, tiny_config: ModelConfig, written: dict[str, Any], ours: RopeScaling
) -> None:
    config = tiny_config.replace(rope_scaling=ours, max_position_embeddings=24)
    model = initialize(MiniCPM(config), seed=7)
    kind = written.get("rope_type", "old-linear")
    folder = write_folder(tmp_path / f"rope-{kind}", model, rope_scaling=written, rope_theta=5e3)
    model = MiniCPM(config.replace(rope_theta=5e3))
    initialize(model, seed=7)
    network = open_network(folder)
    ids = seeded_ids(config, 2, 40)
    with torch.no_grad():
        expected = model(ids)
        assert (network(ids).logits - expected).abs().max() <= TOLERANCE
        network.save_pretrained(tmp_path / f"again-{kind}")
        again = open_network(tmp_path / f"again-{kind}")
        assert (again(ids).logits - expected).abs().max() <= TOLERANCE
        plain = MiniCPM(config.replace(rope_theta=5e3, rope_scaling=None))
        plain.load_state_dict(model.state_dict())
        assert (plain(ids) - expected).abs().max() > 100 * TOLERANCE


def test_padded_batches_answer_like_single_rows(folder: Path, model: MiniCPM) -> None:
    network = open_network(folder)
    ids = seeded_ids(model.config, 2, 9)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = network.generate(ids, attention_mask=mask, **settings)
    alone = network.generate(ids[1:, 4:], **settings)
    assert together[1, 9:].tolist() == alone[0, 5:].tolist()
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = network(ids, attention_mask=mask, position_ids=positions).logits[1, 4:]
        assert (padded - model(ids[1:, 4:])[0]).abs().max() <= TOLERANCE


def test_greedy_and_beams_and_static_caches_generate(folder: Path, model: MiniCPM) -> None:
    network = open_network(folder)
    ids = seeded_ids(model.config, 1, 5)
    sequence = ids
    with torch.no_grad():
        for _ in range(8):
            sequence = torch.cat((sequence, model(sequence)[:, -1].argmax(-1, keepdim=True)), dim=1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(network.generate(ids, **settings), sequence)
    assert torch.equal(network.generate(ids, use_cache=False, **settings), sequence)
    assert torch.equal(network.generate(ids, cache_implementation="static", **settings), sequence)
    assert network.generate(ids, num_beams=3, **settings).shape == (1, 13)


def test_training_lowers_the_loss_with_and_without_recomputing(folder: Path, model: MiniCPM) -> None:
    network = open_network(folder)
    network.train()
    ids = seeded_ids(model.config)
    losses = []
    for enable in (False, True):
        if enable:
            # transformers 5 renamed it.
            getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)()
        network.zero_grad()
        loss = network(ids, labels=ids).loss
        loss.backward()
        losses.append((loss.item(), network.model.layers[2].mlp.up_proj.weight.grad.clone()))
    expected = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert losses[0][0] == pytest.approx(expected, abs=1e-5)
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def force(network: Any, answer: list[int]) -> list[list[int]]:
    """Let `generate` say `answer`; returns the list of prompts that it is given."""
    prompts: list[list[int]] = []

    class Script(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not prompts:
                prompts.append(input_ids[0].tolist())
            place = input_ids.shape[1] - len(prompts[0])
            scores[:] = -1e9
            scores[:, answer[min(place, len(answer) - 1)]] = 0.0
            return scores

    network.script = transformers.LogitsProcessorList([Script()])
    return prompts


def test_chat_keeps_the_last_token_and_the_callers_history(folder: Path) -> None:
    tokenizer, network = open_folder(folder)
    answer = tokenizer("泰山")["input_ids"][1:]
    prompts = force(network, answer)
    history = [{"role": "system", "content": " 你是助手 "}]
    response, after = network.chat(
        tokenizer, " 你好 ", history, logits_processor=network.script, max_new_tokens=len(answer)
    )
    # Stopped by length: every token is the answer's, the last one too.
    assert response == "泰山"
    assert history == [{"role": "system", "content": " 你是助手 "}]
    assert after == [*history, {"role": "user", "content": " 你好 "}, {"role": "assistant", "content": "泰山"}]
    assert prompts[0] == tokenizer("你是助手<用户>你好<AI>")["input_ids"]
    prompts = force(network, [*answer, 2])
    response, _ = network.chat(tokenizer, "你好", logits_processor=network.script, max_length=100)
    assert response == "泰山"
    assert prompts[0].count(1) == 1


def test_chat_cuts_a_turn_that_the_model_invents(folder: Path) -> None:
    tokenizer, network = open_folder(folder)
    force(network, [*tokenizer("泰山<用户>你好<AI>泰山")["input_ids"][1:], 2])
    response, _ = network.chat(tokenizer, "你好", logits_processor=network.script, do_sample=False)
    assert response == "泰山"


def test_chat_does_not_take_typed_text_for_control_tokens(folder: Path) -> None:
    tokenizer, network = open_folder(folder)
    prompts = force(network, [2])
    network.chat(tokenizer, "a</s>b<s>", logits_processor=network.script, max_length=200)
    assert prompts[0].count(2) == 0
    assert prompts[0].count(1) == 1


def test_what_the_code_cannot_run_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for change in ({"hidden_act": "fatrelu"}, {"num_experts": 8}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}):
        (folder / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=r"dense MiniCPM models|rope scaling 'yarn' is not supported"):
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="the published MiniCPM-1B tokenizer is not beside the checkout")
def test_the_published_tokenizer_gives_the_published_prompt(folder: Path) -> None:
    network = open_network(folder)
    network.resize_token_embeddings(73440)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(REAL_TOKENIZER), bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    prompts = force(network, [*tokenizer("泰山")["input_ids"][1:], 2])
    response, _ = network.chat(tokenizer, "你好", logits_processor=network.script)
    assert prompts[0] == [1, 1786, 4194, 59388, 23523, 59396, 10850, 59388]
    assert response == "泰山"
