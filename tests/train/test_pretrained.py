"""A trunk that begins with the weights of a GPT-2 or Llama of transformers: against what transformers computes with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaflow.config.load import load
from megaflow.config.schema import Config
from megaflow.errors import UserError
from megaflow.model import build
from megaflow.model.attention import prepare
from megaflow.model.parts import unigram
from megaflow.model.trunk import rotary
from megaflow.train import checkpoint as checkpoints
from megaflow.train import pretrained, stages

SIZES = ["model.layers=2", "model.hidden=32", "model.heads=2", "model.belief_dim=32"]
VOCAB = 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory, shards):
    """A random GPT-2 and a random Llama of two heads, with the tokenizer of the tests' shards."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("start")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=32, n_layer=3, n_head=2, bos_token_id=VOCAB - 1))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=VOCAB - 1, max_position_embeddings=48, **sizes))
    with torch.no_grad():
        for p in gpt2.parameters():
            p.normal_(std=0.3)
        for name, p in gpt2.named_parameters():
            if name.endswith(("c_attn.bias", "attn.c_proj.bias", "wpe.weight")):
                p.zero_()  # what has no place in our trunk
    for name, model in (("gpt2", gpt2.eval()), ("llama", llama.eval())):
        model.save_pretrained(place / name)
        shutil.copy(shards("coded") / "tokenizer.json", place / name / "tokenizer.json")
    return place, {"gpt2": gpt2, "llama": llama}


def network_of(config, shards, *words: str):
    loaded: Config = load(str(config("coded")), [*SIZES, *words]).config
    loaded.model.heads = 2
    law = unigram(torch.ones(VOCAB, dtype=torch.int64).numpy())
    network = build.baseline_network(loaded, law, torch.device("cpu"))
    build.draw(network, 0)
    return network.eval(), loaded


@torch.no_grad()
@pytest.mark.parametrize("more", [[], ["model.neighbors=0"], ["model.head=tied", "model.neighbors=2"]])
def test_of_one_token_a_gpt2_is_computed_exactly(folders, config, shards, more):
    """Where positions do not matter yet: a masked network of one position that is there, its norms moved as GPT-2's are."""
    place, models = folders
    network, loaded = network_of(config, shards, "model.family=masked", "model.qk_norm=false", *more)
    pretrained.begin_with(network, place / "gpt2", load_of(loaded, layers=2), shards("coded"))
    models["gpt2"].transformer.h = models["gpt2"].transformer.h[:2]
    for token in (3, 77, VOCAB - 1):
        ids = torch.tensor([[token]])
        wanted = models["gpt2"](input_ids=ids).logits[0, 0]
        hidden = network(ids, torch.tensor([0.3], dtype=torch.float64), torch.zeros_like(ids, dtype=torch.bool))
        torch.testing.assert_close((hidden @ network.weight.T)[0, 0], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_baseline_begins_where_gpt2_begins_a_text(folders, config, shards):
    """Its learned start is the token before all texts. Without the shift before attention, which has no place in a trunk without time."""
    place, _ = folders
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(place / "gpt2").eval()
    model.transformer.h = model.transformer.h[:2]
    tensors = load_file(place / "gpt2" / "model.safetensors")
    for name in list(tensors):
        if name.endswith("ln_1.bias"):
            tensors[name].zero_()
    for block in model.transformer.h:
        block.ln_1.bias.zero_()
    other = place / "gpt2-plain"
    shutil.copytree(place / "gpt2", other, dirs_exist_ok=True)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    network, loaded = network_of(config, shards, "model.family=autoregressive", "model.qk_norm=false")
    pretrained.begin_with(network, other, loaded, shards("coded"))
    found = (network(torch.tensor([[5]])) @ network.weight.T + network.bias)[0, 0]
    torch.testing.assert_close(found, model(input_ids=torch.tensor([[VOCAB - 1]])).logits[0, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_is_llama_s(folders, config, shards):
    place, models = folders
    network, loaded = network_of(config, shards, "model.family=autoregressive", "model.qk_norm=false")
    pretrained.begin_with(network, place / "llama", loaded, shards("coded"))
    llama, x = models["llama"].model, torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(network.trunk.blocks, llama.layers, strict=True):
        positions = llama.rotary_emb(x, torch.arange(9)[None])
        causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
        wanted, _ = theirs.self_attn(hidden_states=x, position_embeddings=positions, attention_mask=causal)
        attend = prepare("plain", x, 16, causal=True)
        torch.testing.assert_close(ours.attention(x, [], rotary(torch.arange(9), 16), attend, None, 0), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.gains, torch.stack([theirs.input_layernorm.weight, theirs.post_attention_layernorm.weight]))


@torch.no_grad()
def test_fewer_dimensions_are_the_nearest(folders, config, shards):
    place, models = folders
    network, loaded = network_of(config, shards, "model.family=autoregressive", "model.belief_dim=8", "model.neighbors=1")
    pretrained.begin_with(network, place / "gpt2", loaded, shards("coded"))
    embeddings = models["gpt2"].transformer.wte.weight
    left, size, right = torch.linalg.svd(embeddings, full_matrices=False)
    nearest = (left[:, :8] * size[:8]) @ right[:8]
    torch.testing.assert_close(network.table @ network.widen.weight[:, -8:].T, nearest, rtol=1e-4, atol=1e-4)
    assert network.widen.weight[:, :-8].count_nonzero() == 0 and network.table.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(network.weight, embeddings)


def load_of(config: Config, layers: int) -> Config:
    config.model.layers = layers
    return config


@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_a_run_begins_with_them(folders, config, tmp_path, family, capsys):
    place, models = folders
    few = ["train.steps=1", "train.validate_every=1", "train.validation_rows=8", "optim.learning_rate=1e-9", "optim.weight_decay=0"]
    words = [f"run.dir={tmp_path / 'run'}", f"model.start={place / 'gpt2'}", *SIZES, f"model.family={family}", *few]
    assert stages.pretrain(str(config("coded")), words) == 0
    told = f"begins with 2 of 3 layers and 300 of 300 tokens of gpt2 in {place / 'gpt2'}, without its learned positions and biases"
    assert f"{tmp_path / 'run'}: {told} of attention\n" in capsys.readouterr().err
    found = checkpoints.newest(tmp_path / "run")
    wanted = models["gpt2"].transformer.h[0].attn.c_attn.weight.T
    torch.testing.assert_close(found.read("weights/trunk.blocks.0.qkv.weight"), wanted.detach(), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(found.read("weights/weight"), models["gpt2"].transformer.wte.weight.detach(), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    "more, said",
    [
        ({}, ""),
        ({"rope_theta": 10000.0, "rope_scaling": None}, ""),
        ({"rope_theta": 500000.0}, "rope_theta=500000"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}, "rope_theta=500000 and rope_type=llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ],
)
def test_other_rotary_angles_are_said(folders, config, shards, tmp_path, more, said):
    folder = shutil.copytree(folders[0] / "llama", tmp_path / "llama")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: about[key] for key in about if not key.startswith("rope_")} | more))
    _, loaded = network_of(config, shards, "model.qk_norm=false")
    told = pretrained.check(folder, loaded, shards("coded"))
    assert told.startswith("begins with 2 of 2 layers and 300 of 300 tokens of llama") and "without its MLPs" in told
    assert ("attention is turned by" in told) == bool(said) and said in told


@pytest.mark.parametrize(
    "kind, more, said",
    [
        ("gpt2", {}, ""),
        ("gpt2", {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}, "activation_function=relu, scale_attn_by_inve"),
        ("gpt2", {"layer_norm_epsilon": 0.01, "scale_attn_weights": False}, "scale_attn_weights=False, layer_norm_epsilon=0.01, which"),
        ("llama", {}, ""),
        ("llama", {"attention_bias": True, "rms_norm_eps": 0.1}, "it has attention_bias=True, rms_norm_eps=0.1, which this trunk has not"),
    ],
)
def test_what_a_model_computes_otherwise_is_said(folders, config, shards, tmp_path, kind, more, said):
    folder = shutil.copytree(folders[0] / kind, tmp_path / kind)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | more))
    _, loaded = network_of(config, shards, "model.qk_norm=false")
    told = pretrained.check(folder, loaded, shards("coded"))
    assert ("which this trunk has not" in told) == bool(said) and said in told


class TestRefused:
    """Before anything is made, with one sentence."""

    def refused(self, config, tmp_path, folder, said, *words):
        with pytest.raises(UserError, match=said):
            stages.pretrain(str(config("coded")), [f"run.dir={tmp_path / 'run'}", f"model.start={folder}", *SIZES, *words])
        assert not (tmp_path / "run" / "config.yaml").exists()

    @pytest.fixture
    def folder(self, folders, tmp_path):
        return shutil.copytree(folders[0] / "gpt2", tmp_path / "gpt2")

    def test_another_shape(self, config, tmp_path, folder):
        self.refused(config, tmp_path, folder, "the model has model.hidden=32, and the config model.hidden=64", "model.hidden=64")
        self.refused(config, tmp_path, folder, "has model.mlp_ratio=4, and the config model.mlp_ratio=2", "model.mlp_ratio=2")
        self.refused(config, tmp_path, folder, "has 3 layers; set model.layers to that or fewer", "model.layers=4")

    def test_no_model(self, config, tmp_path, folder):
        self.refused(config, tmp_path, tmp_path / "nowhere", "no model of transformers is here")
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
        self.refused(config, tmp_path, folder, "a model of GPT-2's or Llama's shape is needed; config.json has no 'bert' of one")

    def test_weights_that_are_no_safetensors(self, config, tmp_path, folder):
        torch.save({"wte.weight": torch.zeros(3)}, folder / "model.safetensors")
        self.refused(config, tmp_path, folder, "its weights cannot be read .*; they must be safetensors")

    def test_weights_that_are_no_numbers(self, config, tmp_path, folder):
        """Found where they are read, which a run does once, after it is made."""
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("wte.weight"))
        tensors[name][0, 0] = float("nan")
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError, match="wte.weight has values that are no finite numbers; give another model"):
            stages.pretrain(str(config("coded")), [f"run.dir={tmp_path / 'run'}", f"model.start={folder}", *SIZES])

    def test_an_index_of_another_place(self, config, tmp_path, folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "../x.safetensors"}}))
        self.refused(config, tmp_path, folder, "names files of other folders")

    def test_another_tokenizer(self, config, tmp_path, folder, shards):
        shutil.copy(shards("char") / "tokenizer.json", folder / "tokenizer.json")
        self.refused(config, tmp_path, folder, "of the shards' tokens; prepare shards with its tokenizer")
