"""`new_tokens`: rows of the embedding and of a tied or untied head, beside every method."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import weft
from support import MERGEABLE, METHODS, config, distance, same_bits
from weft.methods import LayerConfig
from weft.training.trainer import recompute_activations

WORDS, NEW = 40, [37, 39]
IDS = torch.tensor([[1, 37, 5, 39, 2], [39, 37, 3, 4, 5]])
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": WORDS}


def llama(tied=False, seed=0):
    return built(
        transformers.LlamaForCausalLM,
        seed,
        **SMALL,
        intermediate_size=28,
        tie_word_embeddings=tied,
        attention_bias=True,
    )


def built(cls, seed=0, **fields):
    torch.manual_seed(seed)
    made = cls(cls.config_class(**fields)).eval()
    for p in made.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return made


def gpt2():
    return built(
        transformers.GPT2LMHeadModel,
        vocab_size=WORDS,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )


def bert():
    return built(transformers.BertForMaskedLM, **SMALL, intermediate_size=28)


def gemma():
    """Scales inside its embedding module, in the weight's dtype."""
    fields = {**SMALL, "intermediate_size": 28, "head_dim": 8, "num_key_value_heads": 2}
    return built(transformers.Gemma3ForCausalLM, **fields, sliding_window=8)


def t5():
    return built(
        transformers.T5ForConditionalGeneration,
        vocab_size=WORDS,
        d_model=16,
        d_kv=8,
        d_ff=28,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )


def bart():
    return built(
        transformers.BartForConditionalGeneration,
        vocab_size=WORDS,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=28,
        decoder_ffn_dim=28,
        max_position_embeddings=20,
        scale_embedding=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )


class Plain(nn.Module):
    """No accessor of transformers; the head has a bias and reads the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(WORDS, 16, padding_idx=0), nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        logits = self.head(torch.tanh(self.mid(self.embed(input_ids))))
        return type("Output", (), {"logits": logits})


def plain():
    torch.manual_seed(0)
    return Plain()


MODELS = {
    "llama": (llama, 2),
    "tied": (lambda: llama(tied=True), 1),
    "gpt2": (gpt2, 1),
    "bert": (bert, 1),
    "gemma": (gemma, 1),
    "t5": (t5, 1),
    "bart": (bart, 1),
    "plain": (plain, 1),
}


def run(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if hasattr(model, "get_encoder") else {}
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return model(input_ids=ids, **(extra if encodes else {})).logits


def loss(model):
    return F.cross_entropy(run(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def spread(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in adapter.token_rows.values():
            rows.add_(torch.randn(rows.shape, generator=generator))


def dense(model, adapter):
    """The same base with the rows written into its weights, which then train in full."""
    with weft.use(model, None):
        other = copy.deepcopy(model)
    weft.detach(other)
    for name, rows in adapter.token_rows.items():
        other.get_submodule(name).weight.requires_grad_()
        with torch.no_grad():
            other.get_submodule(name).weight[NEW] = rows.to(other.get_submodule(name).weight.dtype)
    return other


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_a_model_with_these_rows(name):
    make, tables = MODELS[name]
    model = make()
    start = run(model)
    adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=NEW))
    assert len(adapter.token_rows) == tables
    assert distance(run(model), start) < 1e-5
    spread(adapter)
    other = dense(model, adapter)
    assert distance(run(model), run(other)) < 1e-5 < distance(run(model), start)
    loss(model).backward()
    loss(other).backward()
    for module, rows in adapter.token_rows.items():
        wanted = other.get_submodule(module).weight.grad[NEW]
        assert distance(rows.grad, wanted) < 1e-4
    merged = weft.merge(model, verify={"input_ids": IDS} if name in ("llama", "tied") else None)
    assert merged.weights >= tables and distance(run(model), run(other)) < 1e-5
    weft.unmerge(model)
    weft.detach(model)
    assert same_bits(run(model), start)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_saves_and_loads_with_them(name, tied, tmp_path):
    given = {"targets": "all-linear", "r": 2} if issubclass(METHODS[name], LayerConfig) else {}
    if name == "Bottleneck":
        given = {"r": 2, "targets": ["down_proj"]}
    made = config(name, **given)
    if name in ("Full", "Head"):  # they train the whole head, or all
        with pytest.raises(weft.TargetError, match=r"is trained in full, so all its rows train"):
            weft.attach(llama(), config(name, new_tokens=NEW))
        if name == "Full" or tied:
            return
        made = weft.Head(new_tokens={"embed_tokens": NEW})
    else:
        made = config(name, **given, new_tokens=NEW)
    model = llama(tied)
    adapter = weft.attach(model, made)
    before = weft.snapshot(model)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model.train()
    for _ in range(4):
        optimiser.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
    weft.audit(model, before, weft.snapshot(model))
    weft.save(model, tmp_path)
    assert adapter.nbytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    again = llama(tied)
    with torch.no_grad():  # resized in another process, so the rows are others
        for module in {again.model.embed_tokens, again.lm_head}:
            module.weight[NEW] = torch.randn(2, 16)
    loaded = weft.load(again, tmp_path)
    assert distance(run(again), run(model.eval())) < 1e-5
    assert [r.shape for r in loaded.token_rows.values()] == [
        r.shape for r in adapter.token_rows.values()
    ]
    if name in MERGEABLE:
        output = run(again)
        weft.merge(again, verify={"input_ids": IDS})
        assert distance(run(again), output) < 1e-5
        weft.unmerge(again)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["LoRA", "VeRA", "BitFit"])
def test_the_file_grows_by_rows_times_width(name, tied, tmp_path):
    sizes, files = [], []
    for tokens in ([], NEW):
        model = llama(tied)
        given = {"r": 2} if name != "BitFit" else {}
        weft.attach(model, METHODS[name](**given, new_tokens=tokens))
        weft.save(model, tmp_path / str(len(tokens)))
        found = weft.inspect(tmp_path / str(len(tokens)))
        sizes.append(found.trainable if hasattr(found, "trainable") else found.numbers)
        files.append((tmp_path / str(len(tokens)) / "adapter_model.safetensors").stat().st_size)
    grown = 2 * 16 * (1 if tied else 2)
    assert sizes[1] - sizes[0] == grown
    assert 4 * grown <= files[1] - files[0] < 4 * grown + 1000  # and their names in the header


def test_tied_modules_share_one_tensor_through_copies_and_casts():
    model = llama(tied=True)
    adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=NEW))
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        handle = weft.adapters(each)["default"]
        embed, head = (handle.token_layers[n].rows for n in ("model.embed_tokens", "lm_head"))
        assert embed is head and len(handle.token_rows) == 1
        assert sum(p is embed for p in each.parameters()) == 1
        spread(handle)
        assert distance(run(each), run(dense(each, handle))) < 1e-5
    assert [n for n, _ in adapter.named_parameters()][-1] == "model.embed_tokens.rows"
    assert adapter.plan().rows[-1].kind == "tokens"


def test_rows_of_one_batch_use_their_own_new_tokens():
    model = llama(tied=True)
    base = run(model)
    for name, seed in (("a", 1), ("b", 2)):
        adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=NEW), name=name)
        spread(adapter, seed)
    weft.attach(model, weft.LoRA(r=2), name="c")
    alone = {}
    for name in ("a", "b"):
        with weft.use(model, name):
            alone[name] = run(model)
    ids = IDS[[0, 1, 0, 1]]
    with weft.use(model, ["a", "b", None, "c"]):
        mixed = run(model, ids)
    for row, wanted in enumerate((alone["a"][0], alone["b"][1], base[0], base[1])):
        assert distance(mixed[row], wanted) < 1e-5
    assert distance(alone["a"], alone["b"]) > 0.1


def test_a_low_precision_base_trains_rows_in_float32_and_uses_them_as_merged():
    model = llama(tied=True).to(torch.bfloat16)
    adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=NEW))
    assert {p.dtype for p in adapter.token_rows.values()} == {torch.float32}
    spread(adapter)
    assert same_bits(run(model), run(dense(model, adapter)))


def test_ids_of_32_bits_and_tokens_beside_a_padding_row():
    model = plain()
    adapter = weft.attach(model, weft.LoRA(targets=["mid"], new_tokens=[0, 37]))
    spread(adapter)
    with torch.no_grad():
        ids = torch.tensor([[0, 37, 3]])
        assert same_bits(run(model, ids), run(model, ids.int()))
    run(model, ids).sum().backward()
    assert adapter.token_rows["embed"].grad.abs().sum(1).gt(0).all()


def test_a_table_that_accelerate_offloads_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    with pytest.raises(weft.TargetError, match="accelerate"):
        weft.attach(model, weft.BitFit(new_tokens=NEW))
    hooks = accelerate.hooks
    model = llama()  # an embedding with two hooks, the second of which takes its weight away
    hooks.add_hook_to_module(model.model.embed_tokens, hooks.ModelHook())
    hooks.add_hook_to_module(
        model.model.embed_tokens,
        hooks.AlignDevicesHook(torch.device("cpu"), offload=True),
        append=True,
    )
    with pytest.raises(weft.TargetError, match="accelerate"):
        weft.attach(model, weft.BitFit(new_tokens=NEW))


def test_rows_of_a_table_that_is_offloaded_after_attach_stay_where_they_train(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = llama(), torch.tensor([[0, 37, 3]])
    adapter = weft.attach(model, weft.LoRA(r=2, targets=["q_proj"], new_tokens=NEW))
    spread(adapter)
    wanted = run(model, ids).detach()
    model = accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(run(model, ids), wanted)
    assert not any(p.is_meta for p in adapter.parameters())
    weft.save(model, tmp_path)
    with pytest.raises(weft.MergeError, match="is offloaded by accelerate"):
        weft.merge(model)


def test_generation_with_a_cache_and_gradient_checkpointing():
    model = llama(tied=True)
    adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=NEW))
    spread(adapter)
    other = dense(model, adapter)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), other.generate(IDS, **settings))
    loss(model).backward()
    wanted = [p.grad.clone() for p in adapter.token_rows.values()]
    recompute_activations(model.train())
    for p in adapter.parameters():
        p.grad = None
    loss(model).backward()
    found = [p.grad for p in adapter.token_rows.values()]
    assert all(distance(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([50], r"'model.embed_tokens' has 40 rows, and none for the id 50. Resize"),
        ({"word": [1]}, r"names no embedding or linear layer. Nearest: \["),
        ({"norm": [1]}, "neither an embedding nor a linear layer"),
    ],
)
def test_tokens_that_a_model_does_not_have(given, words):
    model = llama()
    with pytest.raises(weft.TargetError, match=words):
        weft.attach(model, weft.LoRA(new_tokens=given))
    assert not weft.adapters(model) and type(model.lm_head) is nn.Linear


def test_tied_modules_with_different_ids_and_layers_that_are_adapted_too():
    given = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(weft.TargetError, match="are tied, and have different ids"):
        weft.attach(llama(tied=True), weft.LoRA(new_tokens=given))
    adapter = weft.attach(llama(), weft.LoRA(new_tokens=given))
    assert [layer.method.ids for layer in adapter.token_layers.values()] == [(1,), (2,)]
    with pytest.raises(weft.TargetError, match="'lm_head' is named by targets and by new_tokens"):
        weft.attach(llama(), weft.LoRA(targets=["lm_head"], new_tokens=NEW))
    with pytest.raises(weft.TargetError, match=r"'lm_head.weight' is trained in full"):
        weft.attach(llama(), weft.LoRA(modules_to_save=["lm_head"], new_tokens=NEW))
    only = weft.attach(llama(), weft.LoRA(targets=["lm_head"], new_tokens={"embed_tokens": NEW}))
    assert list(only.token_layers) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["<tool>"], r"is text: give tokenizer.convert_tokens_to_ids"),
        ("<tool>", "these are no ids"),
        ([3, 3], "3 is given twice"),
        ([-1], "-1 is no id"),
        ([True], "True is no id"),
        ([1.5], "1.5 is no id"),
        (7, "these are no ids"),
        ({"": [1]}, "is no ending"),
        ([2**31], "2147483648 is no id"),
        ([10**40], "is no id"),
    ],
)
def test_values_that_are_no_tokens(given, words):
    with pytest.raises(weft.ConfigError, match=words):
        weft.LoRA(new_tokens=given)


def test_the_same_tokens_in_any_form():
    wanted = weft.LoRA(new_tokens=[5, 6, 7])
    assert (
        weft.LoRA(new_tokens=range(5, 8)) == wanted == weft.LoRA(new_tokens=torch.tensor([7, 5, 6]))
    )
    for config_ in (wanted, weft.LoRA(), weft.LoRA(new_tokens={"embed": [2, 1]})):
        assert weft.methods.from_json(weft.methods.to_json(config_)) == config_
    assert "new_tokens" not in weft.methods.to_json(weft.LoRA())


def test_a_model_of_several_embeddings_must_be_told_which():
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Embedding(5, 4), "c": nn.Linear(4, 4)})
    with pytest.raises(weft.TargetError, match=r"which of the embeddings \['a', 'b'\]"):
        weft.attach(model, weft.LoRA(targets=["c"], new_tokens=[1]))
    adapter = weft.attach(model, weft.LoRA(targets=["c"], new_tokens={"b": [1]}))
    assert list(adapter.token_layers) == ["b"]


def test_a_file_and_a_model_that_are_tied_otherwise(tmp_path):
    for tied in (False, True):
        model = llama(tied)
        adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=NEW))
        spread(adapter)
        weft.save(model, tmp_path / str(tied))
    with pytest.raises(weft.CheckpointError, match=r"no rows for the new tokens of 'lm_head'"):
        weft.load(llama(), tmp_path / "True")
    with pytest.raises(weft.CheckpointError, match=r"differ in the file from those of another"):
        weft.load(llama(tied=True), tmp_path / "False")
    small = built(
        transformers.LlamaForCausalLM,
        **{**SMALL, "vocab_size": 38, "intermediate_size": 28, "attention_bias": True},
    )
    with pytest.raises(weft.CheckpointError, match=r"has 38 rows, and none for the id 39"):
        weft.load(small, tmp_path / "False")
    assert not weft.adapters(small)


def test_adapters_with_new_tokens_have_no_sum():
    model = llama()
    weft.attach(model, weft.LoRA(r=2, new_tokens=NEW), name="a")
    weft.attach(model, weft.LoRA(r=2), name="b")
    for strengths in ({"a": 1.0}, {"b": 0.5, "a": 0.5}):
        with pytest.raises(weft.UnsupportedError, match=r"'a' .LoRA. trains rows of new tokens"):
            weft.use(model, strengths)
        with pytest.raises(weft.UnsupportedError, match=r"'a' .LoRA. trains rows of new tokens"):
            weft.combine(model, strengths, name="both")
    with weft.use(model, {"b": 0.5}):
        run(model)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_new_tokens_takes_the_place_of_another(tied, tmp_path):
    answers = {}
    for seed, words in enumerate((NEW, [37], [])):
        model = llama(tied)
        adapter = weft.attach(model, weft.LoRA(r=2, new_tokens=words))
        spread(adapter, seed)
        weft.save(model, tmp_path / str(seed))
        answers[seed] = run(model)
    model = llama(tied)
    base, modules = run(model), dict(model.named_modules())
    weft.load(model, tmp_path / "0", name="a")
    for seed in (1, 0, 2):
        handle = weft.load(model, tmp_path / str(seed), name="a", replace=True)
        assert same_bits(run(model), answers[seed])
        assert len(handle.token_rows) == (0 if seed == 2 else 1 if tied else 2)
    weft.use(model, {"a": 0.5})
    with pytest.raises(weft.UnsupportedError, match=r"trains rows of new tokens.*with strengths"):
        weft.load(model, tmp_path / "0", name="a", replace=True)
    weft.use(model, "a")
    assert same_bits(run(model), answers[2])
    weft.load(model, tmp_path / "0", name="a", replace=True)
    assert same_bits(run(model), answers[0])
    weft.detach(model, "a")
    assert same_bits(run(model), base) and dict(model.named_modules()) == modules


def test_their_rows_are_in_a_group_of_the_optimiser():
    adapter = weft.attach(llama(), weft.LoRA(r=2, new_tokens=NEW, init="pissa"))
    groups = weft.parameter_groups(adapter, 1e-3, lora_plus=4, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(map(id, adapter.parameters()))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in adapter.token_rows.values()} == {1e-3}
