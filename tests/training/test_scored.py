"""The loss from the logits of its own tokens is the loss from all logits, with its gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaConfig

import weft
from weft.encoding.rows import IGNORED
from weft.training import scored
from weft.training.losses import mean_entropy, reduced

SMALL = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}
METHODS = {
    "LoRA": weft.LoRA(r=2),
    "LoRA, head": weft.LoRA(r=2, targets=["lm_head"]),
    "Prefix": weft.Prefix(n=3),
    "PreEmbed": weft.PreEmbed(l_p=2, l_i=2),
    "Full": weft.Full(),
}


def model_of(kind, method):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).double()
    adapter = weft.attach(model, METHODS[method])
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model, adapter


def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (3, 9))
    labels = ids.clone()
    labels[0, :5] = labels[1, :2] = labels[2, :7] = IGNORED
    labels[1, 7:] = IGNORED  # padding
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}, labels


def run(model, adapter, inputs, labels, context):
    model.zero_grad(set_to_none=True)
    with context:
        logits = model(**inputs).logits
    loss = mean_entropy(logits.double(), labels)
    loss.backward()
    found = {k: p.grad.clone() for k, p in adapter.named_parameters()}
    return logits, loss.detach(), found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_metrics_and_gradients_are_those_of_all_logits(kind, method):
    if method == "LoRA, head" and CONFIGS[kind].tie_word_embeddings:
        pytest.skip("a tied head is refused as a target")
    model, adapter = model_of(kind, method)
    inputs, labels = batch()
    plain = scored.prompts.answering(model, labels)
    logits, loss, gradients = run(model, adapter, inputs, labels, plain)
    context = scored.answering(model, inputs, labels)
    few, few_loss, few_gradients = run(model, adapter, inputs, labels, context)
    assert logits.shape == (3, 9, 96)
    if method != "PreEmbed":  # its virtual tokens go through the head
        assert few.shape == (1, int((labels[:, 1:] != IGNORED).sum()), 96)
    torch.testing.assert_close(few_loss, loss)
    torch.testing.assert_close(few_gradients, gradients, rtol=1e-5, atol=1e-7)
    assert any(g.abs().max() > 0 for g in gradients.values())
    torch.testing.assert_close(reduced(few, labels), reduced(logits, labels))


def test_the_metrics_of_a_row_are_sums_over_its_own_tokens():
    model, _ = model_of("llama", "LoRA")
    inputs, labels = batch()
    with torch.no_grad(), scored.answering(model, inputs, labels):
        found = reduced(model(**inputs).logits, labels)
    with torch.no_grad():
        logits = model(**inputs).logits
    for row in range(3):
        steps = [i for i in range(8) if labels[row, i + 1] != IGNORED]
        entropy = torch.nn.functional.cross_entropy(
            logits[row, steps].float(), labels[row, [i + 1 for i in steps]], reduction="sum"
        )
        hits = sum(int(logits[row, i].argmax() == labels[row, i + 1]) for i in steps)
        torch.testing.assert_close(
            found[row], torch.tensor([float(entropy), len(steps), hits], dtype=torch.double)
        )


def reshape_the_logits(model):
    def hook(module, args, kwargs, output):
        rows, length = kwargs["input_ids"].shape
        output.logits = output.logits.view(rows, length, -1)
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def mix_positions(model):
    def hook(module, args, output):
        output.logits = output.logits.cumsum(1)
        return output

    model.register_forward_hook(hook)


@pytest.mark.parametrize("change", [reshape_the_logits, mix_positions])
def test_a_model_whose_logits_are_not_its_head_s_gets_all_positions(change):
    model, adapter = model_of("llama", "LoRA")
    change(model)
    inputs, labels = batch()
    plain = scored.prompts.answering(model, labels)
    logits, loss, gradients = run(model, adapter, inputs, labels, plain)
    context = scored.answering(model, inputs, labels)
    same, same_loss, same_gradients = run(model, adapter, inputs, labels, context)
    assert torch.equal(same, logits) and torch.equal(same_loss, loss)
    torch.testing.assert_close(same_gradients, gradients, rtol=0, atol=0)


def test_the_trial_leaves_modes_hooks_and_random_numbers_alone():
    model, _ = model_of("gpt2", "LoRA")
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    inputs, labels = batch()
    state = torch.get_rng_state()
    with scored.answering(model, inputs, labels):
        pass
    assert [m.training for m in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_without_a_token_in_the_loss_has_a_gradient_of_zero():
    model, adapter = model_of("llama", "LoRA")
    inputs, labels = batch()
    with scored.answering(model, inputs, labels):
        pass  # the trial
    nothing = torch.full_like(labels, IGNORED)
    with scored.answering(model, inputs, nothing):
        logits = model(**inputs).logits
    mean_entropy(logits, nothing, count=5).backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in adapter.parameters())


def test_logits_of_another_length_are_refused():
    labels = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="changes the length of its rows"):
        mean_entropy(torch.randn(2, 7, 4), labels)
