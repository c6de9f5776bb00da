"""Per-token divergences: every path against plain log-softmax, the estimators' claims, the edges."""

import contextlib
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp import divergence
from cmdp.divergence import (
    EXACT,
    SAMPLED,
    Head,
    divergence_from_hidden,
    divergence_from_logits,
    lm_head,
    sampled_divergence,
    score_in_tiles,
)

SEEDS = st.integers(0, 2**31 - 1)
VOCABULARY = 11


def plain(student: torch.Tensor, teacher: torch.Tensor, kind: str, beta: float = 0.5) -> torch.Tensor:
    """The definitions, term by term, with nothing shared with the code under test."""
    p, q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def random_case(seed: int, bias=False, scale=1.0, softcap=None, rows=(VOCABULARY, VOCABULARY)):
    """Student hidden states and head, teacher hidden states (another width) and head, and a mask with an empty row."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    student = Head(normal(rows[0], 6).requires_grad_(), normal(rows[0]).requires_grad_() if bias else None)
    teacher = Head(normal(rows[1], 9), normal(rows[1]) if bias else None, scale, softcap)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    return (
        normal(3, 4, 6).requires_grad_(),
        student._replace(scale=scale, softcap=softcap),
        normal(3, 4, 9),
        teacher,
        mask,
    )


@pytest.fixture(params=["one tile", "many tiles", "kernel"])
def path(request, monkeypatch):
    """Every way to the divergence: our tiles, of all tokens and of one, and TRL's kernel, as on an accelerator."""
    if request.param == "many tiles":
        monkeypatch.setattr(divergence, "TILE", 1)
    if request.param == "kernel":
        monkeypatch.setattr(divergence, "own_tiles", lambda hidden: False)
    return request.param


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"scale": 0.25, "softcap": 3.0}, {"bias": True, "softcap": 2.0}],
    ids=["plain", "bias", "scaled-softcapped", "bias-softcapped"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_from_hidden_are_those_of_plain_log_softmax(path, kind, options, temperature):
    student_hidden, student, teacher_hidden, teacher, mask = random_case(0, **options)
    inputs = [tensor for tensor in (student_hidden, student.weight, student.bias) if tensor is not None]
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))

    def logits(hidden, head):
        raw = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
        return (raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)) / temperature

    expected = plain(logits(student_hidden, student), logits(teacher_hidden, teacher), kind, 0.3) * mask
    expected_gradient = torch.autograd.grad((weight * expected).sum(), inputs)
    actual = divergence_from_hidden(student_hidden, student, teacher_hidden, teacher, mask, kind, 0.3, temperature)
    gradient = torch.autograd.grad((weight * actual).sum(), inputs)

    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXACT)
def test_kernel_tiles_of_tokens_and_vocabulary_change_nothing(kind, monkeypatch):
    from trl.kernels import chunked_divergence

    case = random_case(3, bias=True)
    whole = divergence_from_hidden(*case, kind)
    monkeypatch.setattr(divergence, "own_tiles", lambda hidden: False)
    monkeypatch.setattr(chunked_divergence, "TOKEN_CHUNK_SIZE", 2)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 4)
    tiled = divergence_from_hidden(*case, kind)
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=2e-6)
    gradients = [torch.autograd.grad(value.sum(), (case[0], case[1].weight)) for value in (tiled, whole)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("tile", [1, 10_000])
@pytest.mark.parametrize("padding", [0, 3])
def test_one_projection_gives_divergence_log_probabilities_and_entropy(kind, tile, padding, monkeypatch):
    monkeypatch.setattr(divergence, "TILE", tile)
    student_hidden, student, teacher_hidden, teacher, mask = random_case(8, bias=True, rows=(VOCABULARY + padding,) * 2)
    teacher = teacher._replace(weight=teacher.weight[:VOCABULARY], bias=teacher.bias[:VOCABULARY])
    tokens = torch.randint(0, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(2))
    where = mask * torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])  # the divergence at some tokens alone
    weights = torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(3))
    inputs = [student_hidden, student.weight, student.bias]

    logits = student.logits(student_hidden) / 0.7
    policy = logits.log_softmax(-1)
    expected = (
        plain(logits[..., :VOCABULARY], teacher.logits(teacher_hidden) / 0.7, kind, 0.3) * where,
        policy.gather(-1, tokens[..., None])[..., 0] * mask,
        -(policy.exp() * policy).sum(-1) * mask,
    )
    actual = score_in_tiles(
        student_hidden, student, tokens, mask, teacher_hidden, teacher, where, kind, 0.3, temperature=0.7
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    ours, theirs = (
        torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, values, strict=True)), inputs)
        for values in (actual, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_masked_tokens_cost_nothing_and_a_masked_batch_stays_connected(path):
    student_hidden, student, teacher_hidden, teacher, mask = random_case(5)
    value = divergence_from_hidden(student_hidden, student, teacher_hidden, teacher, mask)
    assert (value[mask == 0] == 0).all()
    assert (value[mask == 1] > 0).all()
    nothing = divergence_from_hidden(student_hidden, student, teacher_hidden, teacher, torch.zeros_like(mask))
    assert nothing.shape == mask.shape
    assert (nothing == 0).all()
    (gradient,) = torch.autograd.grad(nothing.sum(), student_hidden)
    assert (gradient == 0).all()


def test_gradient_reaches_the_student_and_not_the_teacher(path):
    student_hidden, student, teacher_hidden, teacher, mask = random_case(6)
    teacher_hidden.requires_grad_()
    teacher.weight.requires_grad_()
    divergence_from_hidden(student_hidden, student, teacher_hidden, teacher, mask).sum().backward()
    assert student.weight.grad.abs().sum() > 0
    assert student_hidden.grad.abs().sum() > 0
    assert teacher_hidden.grad is None
    assert teacher.weight.grad is None


@given(SEEDS, st.sampled_from(EXACT), st.floats(0.05, 0.95), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_exact_divergences_are_positive_and_zero_between_equals(seed, kind, beta, spread):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, 5, VOCABULARY, generator=draw, dtype=torch.float64)
    value = divergence_from_logits(student, teacher, kind, beta)
    assert (value > 0).all()
    torch.testing.assert_close(value, plain(student, teacher, kind, beta), rtol=1e-9, atol=1e-12)
    shifted = divergence_from_logits(student, student + 7.0, kind, beta)  # the same distribution, other logits
    assert shifted.abs().max() < 1e-12


@given(SEEDS, st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_jsd_swaps_with_its_arguments_and_is_bounded(seed, beta):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = 5 * torch.randn(2, 5, VOCABULARY, generator=draw, dtype=torch.float64)
    value = divergence_from_logits(student, teacher, "jsd", beta)
    torch.testing.assert_close(value, divergence_from_logits(teacher, student, "jsd", 1 - beta))
    entropy = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())
    assert (value <= entropy + 1e-6).all()


@pytest.mark.parametrize("kind", EXACT)
def test_gradient_from_logits_passes_gradcheck(kind):
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: divergence_from_logits(logits, teacher, kind, 0.3), student)


@pytest.mark.parametrize("kind", EXACT)
def test_tokens_impossible_in_both_models_count_for_nothing(kind):
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    banned = torch.full((4, 2), -torch.inf)
    student.requires_grad_()
    value = divergence_from_logits(torch.cat([student, banned], 1), torch.cat([teacher, banned], 1), kind)
    torch.testing.assert_close(value, plain(student, teacher, kind))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", EXACT)
def test_tokens_impossible_in_both_heads_leave_values_and_gradients_finite(path, kind):
    """Two rows of both heads have the bias -inf: all is as with the two heads without them."""
    hidden, student, teacher_hidden, teacher, mask = random_case(9, bias=True)
    tokens = torch.randint(0, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(2))
    padded = [
        head._replace(
            weight=torch.cat([head.weight, torch.ones(2, head.weight.shape[1])]),
            bias=torch.cat([head.bias, torch.full((2,), -torch.inf)]),
        )
        for head in (student, teacher)
    ]
    results = []
    for ours, theirs in ((student, teacher), padded):
        values = [divergence_from_hidden(hidden, ours, teacher_hidden, theirs, mask, kind)]
        if path != "kernel":
            values += score_in_tiles(hidden, ours, tokens, mask, teacher_hidden, theirs, mask, kind, 0.5, 1.0)
        sums, inputs = [value.square().sum() for value in values], (hidden, student.weight)
        results.append((values, [torch.autograd.grad(x, inputs, retain_graph=True) for x in sums]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_what_the_teacher_rules_out_costs_infinity_in_reverse_and_is_bounded_in_jsd():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
    assert divergence_from_logits(student, teacher, "reverse_kl").item() == torch.inf
    assert divergence_from_logits(student, teacher, "forward_kl").isfinite().all()
    assert divergence_from_logits(student, teacher, "jsd").item() < 0.7


# ---- sampled estimators ----


@given(SEEDS, st.floats(0.1, 2))
@settings(max_examples=30, deadline=None)
def test_k1_and_k3_are_unbiased_and_k2_and_k3_are_not_negative(seed, spread):
    """In exact expectation over the student's own distribution, not by simulation."""
    draw = torch.Generator().manual_seed(seed)
    p, q = (spread * torch.randn(2, 7, generator=draw, dtype=torch.float64)).log_softmax(-1)
    kl = plain(p, q, "reverse_kl")
    mean = {kind: (p.exp() * sampled_divergence(p, q, kind)).sum() for kind in SAMPLED}
    torch.testing.assert_close(mean["k1"], kl)
    torch.testing.assert_close(mean["k3"], kl)
    assert (sampled_divergence(p, q, "k2") >= 0).all()
    assert (sampled_divergence(p, q, "k3") >= 0).all()
    assert (sampled_divergence(p, q, "k1") < 0).any()  # two different distributions cross


def test_k2_is_biased_to_third_order_only():
    p = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    direction = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias = []
    for step in (1e-2, 5e-3):
        q = (p + step * direction).log_softmax(-1)
        bias.append(((p.exp() * sampled_divergence(p, q, "k2")).sum() - plain(p, q, "reverse_kl")).abs())
    assert 7 < bias[0] / bias[1] < 9  # halving the distance divides the bias by eight


@pytest.mark.parametrize("kind", SAMPLED)
def test_estimators_vanish_between_equals(kind):
    logps = torch.tensor([-0.1, -3.0, -40.0])
    assert (sampled_divergence(logps, logps, kind) == 0).all()


def test_k2_has_in_expectation_the_gradient_of_the_reverse_kl_and_k1_none():
    draw = torch.Generator().manual_seed(2)
    logits, teacher = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    q = teacher.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    exact = gradient(divergence_from_logits(logits, teacher))
    p = logits.log_softmax(-1)
    torch.testing.assert_close(gradient((p.exp().detach() * sampled_divergence(p, q, "k2")).sum()), exact)
    p = logits.log_softmax(-1)
    k1 = gradient((p.exp().detach() * sampled_divergence(p, q, "k1")).sum())
    assert k1.abs().max() < 1e-12 < exact.abs().max()


# ---- heads ----


def model_with(weight, bias=None, **config):
    """The least that `lm_head` reads of a transformers model."""
    config = types.SimpleNamespace(model_type="tiny", **config)
    config.get_text_config = lambda: config
    return types.SimpleNamespace(
        config=config, get_output_embeddings=lambda: types.SimpleNamespace(weight=weight, bias=bias)
    )


def test_heads_padded_differently_agree_once_cut_to_the_tokenizer(path):
    student_hidden, student, teacher_hidden, teacher, mask = random_case(8, bias=True, rows=(16, 13))
    with pytest.raises(ValueError, match="16 rows and the teacher's 13"):
        divergence_from_hidden(student_hidden, student, teacher_hidden, teacher, mask)
    cut = [lm_head(model_with(head.weight, head.bias), VOCABULARY) for head in (student, teacher)]
    assert [len(head.weight) for head in cut] == [len(head.bias) for head in cut] == [VOCABULARY] * 2
    value = divergence_from_hidden(student_hidden, cut[0], teacher_hidden, cut[1], mask)
    logits = student.logits(student_hidden)[..., :VOCABULARY], teacher.logits(teacher_hidden)[..., :VOCABULARY]
    torch.testing.assert_close(value, plain(*logits, "reverse_kl") * mask, rtol=1e-5, atol=2e-6)
    value.sum().backward()
    assert (student.weight.grad[VOCABULARY:] == 0).all()
    assert student.weight.grad[:VOCABULARY].abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"logit_scale": None}, 1.0, None),
        ({"logit_scale": 0.25}, 0.25, None),
        ({"logits_scaling": 8.0}, 0.125, None),
        ({"lm_head_multiplier": 2.0, "final_logit_softcapping": 30.0}, 2.0, 30.0),
    ],
)
def test_lm_head_reads_how_a_family_scales_its_logits(config, scale, softcap):
    head = lm_head(model_with(torch.ones(3, 2), **config))
    assert (head.scale, head.softcap) == (scale, softcap)


def small_llama():
    import transformers

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
@pytest.mark.parametrize("state", ["active", "off", "merged"])
def test_head_with_an_adapter_gives_the_logits_of_the_model(kind, state):
    from peft import LoraConfig, get_peft_model

    options = {
        "lora": {"target_modules": ["lm_head"]},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind]
    wrapped = get_peft_model(small_llama(), LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter += parameter.requires_grad * torch.randn(parameter.shape)
    if state == "merged":
        wrapped.merge_adapter()
    model, ids = wrapped.get_base_model(), torch.arange(3, 12)[None]
    with wrapped.disable_adapter() if state == "off" else contextlib.nullcontext():
        hidden, logits = model.base_model(ids).last_hidden_state, model(ids).logits
        torch.testing.assert_close(lm_head(model).logits(hidden), logits, rtol=1e-4, atol=1e-5)
    if state == "active":
        trained = [p for p in model.lm_head.parameters() if p.requires_grad]
        ours, theirs = (
            torch.autograd.grad(values.square().sum(), trained, retain_graph=True)
            for values in (lm_head(model).logits(hidden), logits)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_adapter_on_the_head_that_cannot_be_read_is_refused_by_name():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)).get_base_model()
    with pytest.raises(ValueError, match="The adapter on lm_head is not plain LoRA: merge it"):
        lm_head(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_head_on_hidden_states_gives_the_logits_of_the_model(family):
    """Softcapping and scaling as transformers' own models do them."""
    import transformers

    config_class, model_class = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
        "granite": ("GraniteConfig", "GraniteForCausalLM"),
        "cohere": ("CohereConfig", "CohereForCausalLM"),
    }[family]
    config = getattr(transformers, config_class)(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"logits_scaling": 4.0} if family == "granite" else {}),
        **({"final_logit_softcapping": 0.5} if family == "gemma2" else {}),
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(lm_head(model).logits(hidden), model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_unknown_kinds_and_betas_are_refused(call):
    logits = torch.zeros(2, 3)
    case = random_case(0)

    def compute(*arguments):
        function, first = (
            (divergence_from_logits, (logits, logits)) if call == "logits" else (divergence_from_hidden, case)
        )
        return function(*first, *arguments)

    with pytest.raises(ValueError, match="'k3'"):
        compute("k3")
    for beta in (0.0, 1.0, -0.2, 1.5):
        with pytest.raises(ValueError, match="0 < jsd_beta < 1"):
            compute("jsd", beta)
    with pytest.raises(ValueError, match="'reverse_kl'"):
        sampled_divergence(logits, logits, "reverse_kl")
