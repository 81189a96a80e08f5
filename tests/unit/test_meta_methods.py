"""Each method is what its paper says: losses and meta-gradients equal formulas written by hand."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor, nn
from torch.func import grad, vmap

from graftstack.backbones.anatomy import Anatomy, chain
from graftstack.backbones.backbone import Backbone
from graftstack.backbones.registry import build
from graftstack.config.meta import BatchNormMode, EvalConfig, MetaConfig, MethodName
from graftstack.errors import ConfigError
from graftstack.meta.batchnorm import batch_statistics
from graftstack.meta.episode_images import EpisodeBatch
from graftstack.meta.episodes import EpisodeShape
from graftstack.meta.inner_loop import adapt
from graftstack.meta.methods import (
    METHODS,
    Adapting,
    Embedding,
    InnerSettings,
    Outcome,
    head_size,
    inner_settings,
    make_method,
    nearest_neighbour,
)
from graftstack.meta.network import Network, Params

INDUCTIVE, TRANSDUCTIVE = BatchNormMode.inductive, BatchNormMode.transductive
ADAPTING = [method for method in MethodName if method.adapts]
EMBEDDING = [method for method in MethodName if not method.adapts]
SECOND_ORDER = [MethodName.maml, MethodName.anil, MethodName.meta_sgd]
WAYS, SHOTS, QUERIES = 3, 2, 2
SHAPE = EpisodeShape(WAYS, SHOTS, QUERIES)
NUM_CLASSES = 7

modes = pytest.mark.parametrize("mode", [INDUCTIVE, TRANSDUCTIVE])


def configuration(method: MethodName, mode: BatchNormMode = INDUCTIVE, **settings: object) -> MetaConfig:
    inner = {"inner_lr": 0.1, "inner_steps": 1} if method.adapts or method is MethodName.finetune_baseline else {}
    settings = {"num_ways": WAYS, **inner, **settings}
    return MetaConfig(method=method, eval=EvalConfig(batchnorm=mode), **settings)  # type: ignore[arg-type]


def smooth() -> Backbone:
    """A small network without kinks, where finite differences are near to derivatives."""
    torch.manual_seed(0)
    body = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2)),
        *(
            nn.Conv2d(4, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
        ),
    )
    model = nn.Sequential(body, nn.Linear(5, 2)).double()
    for norm in (body[1], body[5]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return Backbone("smooth", model, Anatomy((chain("body", body),), model[1], ("1",), feature_dim=5))


def conv4(dtype: torch.dtype = torch.float64) -> Backbone:
    torch.manual_seed(0)
    return build("conv4").to(dtype)


def learner(backbone: Backbone, config: MetaConfig) -> tuple[Adapting | Embedding, Params, Params]:
    """A method, its meta-parameters as leaves, and the network's running statistics."""
    net = Network(backbone, head_size=head_size(config))
    method = make_method(config, net, num_classes=NUM_CLASSES)
    params = {name: tensor.requires_grad_() for name, tensor in method.meta_parameters().items()}
    return method, params, net.statistics()


def episode(size: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64, shots: int = SHOTS) -> EpisodeBatch:
    """Images of a class have a colour of their own, so that there is something to learn."""
    torch.manual_seed(seed)
    colours = torch.randn(WAYS, 3, 1, 1, dtype=dtype)

    def images(num: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(WAYS).repeat_interleave(num)
        return torch.randn(WAYS * num, 3, size, size, dtype=dtype) + colours[labels], labels

    return EpisodeBatch(*images(shots), *images(QUERIES), torch.tensor([4, 0, 6]), WAYS, shots)


def gradients(objective: Tensor, params: Params) -> Params:
    return dict(zip(params, torch.autograd.grad(objective, list(params.values())), strict=True))


def assert_equal(found: Params, wanted: Params, *, tolerance: float = 1e-9) -> None:
    """Gradients that agree, measured by the largest: some are zero but for rounding (biases before BatchNorm)."""
    assert found.keys() == wanted.keys()
    scale = max(tensor.abs().max() for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


# ---- meta-gradients of methods that adapt -------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_meta_gradients_equal_finite_differences(name: MethodName, num_steps: int, mode: BatchNormMode) -> None:
    method, params, statistics = learner(smooth(), configuration(name, mode, inner_steps=num_steps, inner_lr=0.3))
    batch = episode()
    found = gradients(method.outcome(params, statistics, batch).objective, params)
    torch.manual_seed(1)
    for key, tensor in params.items():
        direction = torch.randn_like(tensor)

        def moved(by: float, key: str = key, direction: Tensor = direction) -> Tensor:
            there = {**params, key: params[key] + by * direction}
            return method.outcome(there, statistics, batch).objective.detach()

        wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
        slope = (found[key] * direction).sum()
        assert abs(slope - wanted) <= 1e-5 * abs(wanted) + 1e-9, key


def conv4_features(params: Params, x: Tensor, normalise: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    for block in (f"backbone.block{index}" for index in (1, 2, 3, 4)):
        x = F.conv2d(x, params[f"{block}.conv.weight"], params[f"{block}.conv.bias"], padding=1)
        x = normalise(x, params[f"{block}.norm.weight"], params[f"{block}.norm.bias"])
        x = F.max_pool2d(F.relu(x), 2)
    return x.flatten(1)


def by_its_own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)


def by_the_first(num: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x[:num].mean(dim=(0, 2, 3), keepdim=True)
        variance = x[:num].var(dim=(0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    return normalise


def support_loss_by_hand(theta: Params, batch: EpisodeBatch) -> Tensor:
    logits = F.linear(conv4_features(theta, batch.support, by_its_own), theta["head.weight"], theta["head.bias"])
    return F.cross_entropy(logits, batch.support_labels)


def query_logits_by_hand(theta: Params, batch: EpisodeBatch, mode: BatchNormMode) -> Tensor:
    if mode is TRANSDUCTIVE:
        features = conv4_features(theta, batch.queries, by_its_own)
    else:
        num = len(batch.support)
        features = conv4_features(theta, torch.cat([batch.support, batch.queries]), by_the_first(num))[num:]
    return F.linear(features, theta["head.weight"], theta["head.bias"])


def adapted_by_hand(theta: Params, rates: Params, batch: EpisodeBatch, num_steps: int, adapting: str = "") -> Params:
    for _ in range(num_steps):
        chosen = {name: tensor for name, tensor in theta.items() if name.startswith(adapting)}
        slopes = torch.autograd.grad(support_loss_by_hand(theta, batch), list(chosen.values()), create_graph=True)
        theta = theta | {
            name: tensor - rates[name] * slope for (name, tensor), slope in zip(chosen.items(), slopes, strict=True)
        }
    return theta


@modes
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_meta_gradients_equal_those_written_in_plain_torch(
    name: MethodName, num_steps: int, mode: BatchNormMode
) -> None:
    method, params, statistics = learner(conv4(), configuration(name, mode, inner_steps=num_steps))
    batch = episode(28)
    outcome = method.outcome(params, statistics, batch)
    theta = {key: tensor for key, tensor in params.items() if not key.startswith("inner_lr.")}
    rates = {key: params.get(f"inner_lr.{key}", torch.full_like(tensor, 0.1)) for key, tensor in theta.items()}
    adapting = "head." if name is MethodName.anil else ""
    logits = query_logits_by_hand(adapted_by_hand(theta, rates, batch, num_steps, adapting), batch, mode)
    wanted = F.cross_entropy(logits, batch.query_labels)
    assert torch.allclose(outcome.objective, wanted)
    assert torch.equal(outcome.loss, outcome.objective.detach())
    assert outcome.num_correct == (logits.argmax(dim=1) == batch.query_labels).sum()
    assert torch.allclose(outcome.inner_losses[0], support_loss_by_hand(theta, batch).detach())
    assert_equal(gradients(outcome.objective, params), gradients(wanted, params))


@modes
def test_fomaml_takes_the_gradient_at_the_adapted_parameters(mode: BatchNormMode) -> None:
    method, params, statistics = learner(conv4(), configuration(MethodName.fomaml, mode, inner_steps=3))
    batch = episode(28)
    found = gradients(method.outcome(params, statistics, batch).objective, params)
    adapted = adapted_by_hand(params, {key: torch.full_like(tensor, 0.1) for key, tensor in params.items()}, batch, 3)
    there = {name: tensor.detach().requires_grad_() for name, tensor in adapted.items()}
    loss = F.cross_entropy(query_logits_by_hand(there, batch, mode), batch.query_labels)
    assert_equal(found, gradients(loss, there))


@pytest.mark.parametrize("batch_size", [None, 2, 4, 100])
def test_reptile_goes_towards_where_sgd_ends(batch_size: int | None) -> None:
    config = configuration(MethodName.reptile, inner_steps=5, inner_batch_size=batch_size)
    method, params, statistics = learner(conv4(), config)
    batch = episode(28)
    outcome = method.outcome(params, statistics, batch)

    phi = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.SGD(phi.values(), lr=0.1)
    size = min(batch_size or 6, 6)
    rows = [0, 2, 4, 1, 3, 5] * 5  # one image of each class, then the next ones
    losses = []
    for step in range(5):
        chosen = rows[step * size : (step + 1) * size]
        part = batch._replace(support=batch.support[chosen], support_labels=batch.support_labels[chosen])
        loss = support_loss_by_hand(phi, part)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal(
        gradients(outcome.objective, params), {name: params[name].detach() - phi[name].detach() for name in params}
    )
    assert torch.allclose(outcome.inner_losses, torch.stack(losses))
    logits = query_logits_by_hand(phi, batch, INDUCTIVE)
    assert torch.allclose(outcome.loss, F.cross_entropy(logits, batch.query_labels))


def test_meta_sgd_begins_with_one_rate_for_each_entry_of_each_parameter() -> None:
    _, params, _ = learner(conv4(), configuration(MethodName.meta_sgd, inner_lr=0.25))
    theta = {name for name in params if not name.startswith("inner_lr.")}
    assert {name for name in params if name not in theta} == {f"inner_lr.{name}" for name in theta}
    for name in theta:
        assert torch.equal(params[f"inner_lr.{name}"], torch.full_like(params[name], 0.25))


@modes
@pytest.mark.parametrize("name", ADAPTING)
def test_a_stack_of_episodes_gives_what_they_give_one_by_one(name: MethodName, mode: BatchNormMode) -> None:
    method, params, statistics = learner(smooth(), configuration(name, mode, inner_steps=2))
    batches = [episode(seed=seed) for seed in range(3)]
    outcomes = [method.outcome(params, statistics, batch) for batch in batches]
    one_by_one = [gradients(outcome.objective, params) for outcome in outcomes]

    def outcome(params: Params, support: Tensor, queries: Tensor) -> tuple[Tensor, Outcome]:
        found = method.outcome(params, statistics, batches[0]._replace(support=support, queries=queries))
        return found.objective, found

    support, queries = (torch.stack([getattr(batch, part) for batch in batches]) for part in ("support", "queries"))
    constants = {key: tensor.detach() for key, tensor in params.items()}
    stacked, found = vmap(grad(outcome, has_aux=True), in_dims=(None, 0, 0))(constants, support, queries)
    for index, (wanted, slopes) in enumerate(zip(outcomes, one_by_one, strict=True)):
        assert_equal({key: tensor[index] for key, tensor in stacked.items()}, slopes)
        for field, value in zip(found, wanted, strict=True):
            assert torch.allclose(field[index], value.detach())


@modes
@pytest.mark.parametrize("name", ADAPTING)
def test_a_stack_of_episodes_can_be_gone_through_in_bf16(name: MethodName, mode: BatchNormMode) -> None:
    method, params, statistics = learner(smooth().float(), configuration(name, mode, inner_steps=2))
    batches = [episode(seed=seed, dtype=torch.float32) for seed in range(2)]
    support, queries = (torch.stack([getattr(batch, part) for batch in batches]) for part in ("support", "queries"))

    def objective(params: Params, support: Tensor, queries: Tensor) -> Tensor:
        return method.outcome(params, statistics, batches[0]._replace(support=support, queries=queries)).objective

    constants = {key: tensor.detach() for key, tensor in params.items()}
    wanted = gradients(method.outcome(params, statistics, batches[0]).objective, params)
    with torch.autocast("cpu", torch.bfloat16):
        found = vmap(grad(objective), in_dims=(None, 0, 0))(constants, support, queries)
    assert_equal({key: tensor[0] for key, tensor in found.items()}, wanted, tolerance=0.1)


# ---- evaluation of methods that adapt -----------------------------------------------------------------------------


def query_logits(name: MethodName, mode: BatchNormMode, batch: EpisodeBatch) -> Tensor:
    """Of a conv4 in fp32: after adaptation, or on features normalised with running statistics."""
    config = configuration(name, mode, **({"inner_steps": 2} if name.adapts else {}))
    method, params, statistics = learner(conv4(torch.float32), config)
    if config.method.adapts:
        return method.query_logits(params, statistics, batch).logits.detach()
    net = Network(conv4(torch.float32), head_size=None)
    features = net.features(net.parameters(), statistics, torch.cat([batch.support, batch.queries]))
    support, queries = features.tensor_split([len(batch.support)])
    return method.classify(support, batch.support_labels, queries, WAYS)


@pytest.mark.parametrize("name", MethodName)
def test_inductive_logits_of_a_query_depend_on_no_other(name: MethodName) -> None:
    batch = episode(28, dtype=torch.float32)
    together = query_logits(name, INDUCTIVE, batch)
    for row in (0, 3):
        alone = query_logits(name, INDUCTIVE, batch._replace(queries=batch.queries[row : row + 1]))
        assert torch.allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)
    others = batch.queries.clone()
    others[1:] *= 10
    assert torch.allclose(query_logits(name, INDUCTIVE, batch._replace(queries=others))[0], together[0], atol=1e-5)


@pytest.mark.parametrize("name", ADAPTING)
def test_transductive_logits_depend_on_the_other_queries(name: MethodName) -> None:
    batch = episode(28, dtype=torch.float32)
    others = batch.queries.clone()
    others[1:] *= 10
    before, after = (query_logits(name, TRANSDUCTIVE, batch._replace(queries=each)) for each in (batch.queries, others))
    assert not torch.allclose(before[0], after[0], atol=1e-3)


@pytest.mark.parametrize("name", ADAPTING)
def test_evaluation_takes_steps_of_its_own(name: MethodName) -> None:
    config = MetaConfig(
        method=name, num_ways=WAYS, inner_lr=0.1, inner_steps=2, eval=EvalConfig(inner_steps=4), inner_batch_size=None
    )
    method, params, statistics = learner(smooth(), config)
    batch = episode()
    assert method.outcome(params, statistics, batch).inner_losses.shape == (2,)
    prediction = method.query_logits(params, statistics, batch)
    assert prediction.inner_losses.shape == (4,)
    assert prediction.logits.shape == (WAYS * QUERIES, WAYS)
    assert prediction.inner_losses[-1] < prediction.inner_losses[0]


def test_the_losses_of_an_inner_loop_say_at_which_step_it_diverged() -> None:
    one = torch.ones((), dtype=torch.float64)
    losses = adapt({"x": one}, [lambda params: params["x"] ** 2] * 3, {"x": 1e200}).losses
    assert losses[0] == 1.0
    assert not losses[1:].isfinite().any()


def test_steps_and_rate_of_the_inner_loop_are_the_users_or_suit_the_method() -> None:
    for name in [*ADAPTING, MethodName.finetune_baseline]:
        usual = inner_settings(MetaConfig(method=name))
        assert usual.lr > 0
        assert usual.num_steps >= 1
        assert usual.num_eval_steps >= usual.num_steps
        given = MetaConfig(method=name, inner_lr=0.5, inner_steps=7)
        assert inner_settings(given) == InnerSettings(0.5, 7, 7)
        given = MetaConfig(method=name, inner_steps=7, eval=EvalConfig(inner_steps=9))
        assert inner_settings(given) == InnerSettings(usual.lr, 7, 9)


# ---- methods on features ------------------------------------------------------------------------------------------


def features(num_episodes: int = 1, *, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of whole episodes, which may share classes, and the class of each."""
    torch.manual_seed(seed)
    classes = torch.cat(
        [torch.randperm(NUM_CLASSES)[:WAYS].repeat_interleave(SHOTS + QUERIES) for _ in range(num_episodes)]
    )
    centres = torch.randn(NUM_CLASSES, dim, dtype=torch.float64)
    return (centres[classes] + torch.randn(len(classes), dim, dtype=torch.float64)).requires_grad_(), classes


def support_and_queries(dim: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Support features with labels, of some classes more than of others, and those of queries."""
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    return torch.randn(7, dim, dtype=torch.float64), labels, torch.randn(20, dim, dtype=torch.float64)


def test_prototypes_learn_from_distances_of_queries_to_the_means_of_support_features() -> None:
    method, params, _ = learner(smooth(), configuration(MethodName.prototypes))
    given, classes = features()
    found = method.loss(params, given, classes, SHAPE)
    losses, num_correct = [], 0
    for way in range(WAYS):
        for query in range(QUERIES):
            z = given[way * (SHOTS + QUERIES) + SHOTS + query]
            starts = [other * (SHOTS + QUERIES) for other in range(WAYS)]
            distances = torch.stack([((z - given[at : at + SHOTS].mean(dim=0)) ** 2).sum() for at in starts])
            losses.append(distances[way] + torch.logsumexp(-distances, dim=0))
            num_correct += int(distances.argmin() == way)
    wanted = torch.stack(losses).mean()
    assert torch.allclose(found.loss, wanted)
    assert (found.num_correct, found.num_counted) == (num_correct, WAYS * QUERIES)
    assert_equal(gradients(found.loss, {"": given}), gradients(wanted, {"": given}))


def test_supcon_is_the_mean_over_images_of_equation_2() -> None:
    method, params, _ = learner(smooth(), configuration(MethodName.supcon, temperature=0.3))
    given, classes = features(2)
    found = method.loss(params, given, classes, SHAPE)
    z = given / given.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        denominator = torch.stack([(z[i] @ z[a] / 0.3).exp() for a in others]).sum()
        relatives = [p for p in others if classes[p] == classes[i]]
        losses.append(-torch.stack([((z[i] @ z[p] / 0.3).exp() / denominator).log() for p in relatives]).mean())
    wanted = torch.stack(losses).mean()
    assert torch.allclose(found.loss, wanted)
    assert_equal(gradients(found.loss, {"": given}), gradients(wanted, {"": given}))


def test_triplets_are_of_the_furthest_relative_and_the_nearest_stranger_beyond_it() -> None:
    method, params, _ = learner(smooth(), configuration(MethodName.triplet, margin=0.4))
    given, classes = features(2)
    found = method.loss(params, given, classes, SHAPE)
    z = given / given.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(z)):
        distances = (z[i] - z).norm(dim=1)
        relative = max(distances[j] for j in range(len(z)) if classes[j] == classes[i] and j != i)
        strangers = [distances[j] for j in range(len(z)) if classes[j] != classes[i] and distances[j] > relative]
        losses += [relative - min(strangers) + 0.4] if strangers else []
    wanted = torch.stack([loss for loss in losses if loss > 0]).mean()
    assert torch.allclose(found.loss, wanted)
    assert_equal(gradients(found.loss, {"": given}), gradients(wanted, {"": given}))


@pytest.mark.parametrize("name", [MethodName.supcon, MethodName.triplet])
def test_joint_losses_count_images_whose_nearest_neighbour_is_of_their_class(name: MethodName) -> None:
    method, params, _ = learner(smooth(), configuration(name))
    given, classes = features(2)
    found = method.loss(params, given, classes, SHAPE)
    cosines = F.normalize(given.detach()) @ F.normalize(given.detach()).T
    nearest = (cosines - 3 * torch.eye(len(given), dtype=cosines.dtype)).argmax(dim=1)
    assert found.num_correct == (classes[nearest] == classes).sum()
    assert found.num_counted == len(classes)


@pytest.mark.parametrize("name", EMBEDDING)
def test_gradients_taken_back_episode_by_episode_are_those_of_one_batch(name: MethodName) -> None:
    method, params, statistics = learner(smooth(), configuration(name))
    net = Network(smooth(), head_size=None)
    batches = [episode(seed=seed) for seed in range(2 if configuration(name).is_joint else 1)]
    classes = torch.cat([batch.classes.repeat_interleave(SHOTS + QUERIES) for batch in batches])

    def embed(batch: EpisodeBatch) -> Tensor:
        with batch_statistics():
            found = net.features(params, statistics, torch.cat([batch.support, batch.queries]))
        parts = [part.unflatten(0, (WAYS, -1)) for part in found.tensor_split([len(batch.support)])]
        return torch.cat(parts, dim=1).flatten(0, 1)

    at_once = gradients(
        method.loss(params, torch.cat([embed(batch) for batch in batches]), classes, SHAPE).loss, params
    )

    given = [embed(batch) for batch in batches]
    leaf = torch.cat(given).detach().requires_grad_()
    leaves = params | {"": leaf}
    loss = method.loss(params, leaf, classes, SHAPE).loss
    slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    *direct, slope = (
        torch.zeros_like(leaf) if each is None else each for each, leaf in zip(slopes, leaves.values(), strict=True)
    )
    total = dict(zip(params, direct, strict=True))
    for part, back in zip(given, slope.split([len(part) for part in given]), strict=True):
        found = torch.autograd.grad(part, list(params.values()), back, materialize_grads=True)
        total = {key: total[key] + each for key, each in zip(params, found, strict=True)}
    assert_equal(total, at_once)


@pytest.mark.parametrize("name", [MethodName.prototypes, MethodName.supcon, MethodName.triplet])
def test_the_class_with_the_nearest_mean_is_chosen(name: MethodName) -> None:
    method, _, _ = learner(smooth(), configuration(name))
    support, labels, queries = support_and_queries()
    logits = method.classify(support, labels, queries, WAYS)
    is_normalised = name is not MethodName.prototypes
    assert torch.equal(method.embedding(support), F.normalize(support) if is_normalised else support)
    wanted = NearestCentroid().fit(method.embedding(support).numpy(), labels.numpy())
    assert np.array_equal(logits.argmax(dim=1).numpy(), wanted.predict(method.embedding(queries).numpy()))


def test_supcon_classifies_as_it_was_trained_by_cosines_over_the_temperature() -> None:
    method, _, _ = learner(smooth(), configuration(MethodName.supcon, temperature=0.3))
    support, _, queries = support_and_queries()
    one_each = support[:WAYS]
    logits = method.classify(one_each, torch.arange(WAYS), queries, WAYS)
    wanted = F.normalize(queries) @ F.normalize(one_each).T / 0.3
    assert torch.allclose(logits.softmax(dim=1), wanted.softmax(dim=1))


def test_the_nearest_neighbour_is_scikit_learns() -> None:
    support, labels, queries = support_and_queries()
    logits = nearest_neighbour(support, labels, queries, WAYS + 1)
    wanted = KNeighborsClassifier(1).fit(support.numpy(), labels.numpy()).predict(queries.numpy())
    assert np.array_equal(logits.argmax(dim=1).numpy(), wanted)
    assert logits.shape == (20, WAYS + 1)
    assert logits[:, WAYS].isneginf().all()


def test_the_baseline_learns_all_training_classes_at_once() -> None:
    method, params, _ = learner(smooth(), configuration(MethodName.finetune_baseline))
    given, classes = features(dim=5)
    found = method.loss(params, given, classes, SHAPE)
    assert params["classifier.weight"].shape == (NUM_CLASSES, 5)
    logits = given @ params["classifier.weight"].T + params["classifier.bias"]
    assert torch.allclose(found.loss, F.cross_entropy(logits, classes))
    assert (found.num_correct, found.num_counted) == ((logits.argmax(dim=1) == classes).sum(), len(classes))


def test_the_baseline_fits_a_linear_classifier_by_gradient_descent() -> None:
    config = configuration(MethodName.finetune_baseline, inner_lr=0.5, inner_steps=30)
    method, _, _ = learner(smooth(), config)
    support, labels, queries = support_and_queries()
    centred = support - support.mean(dim=0)
    unit = centred.square().sum(dim=1).mean().sqrt()
    layer = nn.Linear(6, WAYS).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(layer(centred / unit), labels).backward()
        optimizer.step()
    wanted = layer((queries - support.mean(dim=0)) / unit)
    assert torch.allclose(method.classify(support, labels, queries, WAYS), wanted)


def test_the_baselines_classifier_is_the_same_for_features_of_any_scale() -> None:
    method, _, _ = learner(smooth(), MetaConfig(method=MethodName.finetune_baseline))
    support, labels, queries = support_and_queries()
    logits = method.classify(support, labels, queries, WAYS)
    assert torch.allclose(method.classify(100 * support + 7, labels, 100 * queries + 7, WAYS), logits)
    assert method.classify(torch.ones_like(support), labels, queries, WAYS).isfinite().all()


@pytest.mark.parametrize("name", EMBEDDING)
def test_what_is_trained_are_the_parameters_of_the_network_and_what_the_method_adds(name: MethodName) -> None:
    _, params, _ = learner(smooth(), configuration(name))
    added = {key for key in params if not key.startswith("backbone.")}
    is_baseline = name is MethodName.finetune_baseline
    assert added == ({"classifier.weight", "classifier.bias"} if is_baseline else set())


def test_every_method_can_be_named() -> None:
    assert METHODS.keys() == set(MethodName)


@pytest.mark.parametrize("name", MethodName)
def test_only_metric_losses_need_pytorch_metric_learning(name: MethodName, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pytorch_metric_learning", "pytorch_metric_learning.losses", "pytorch_metric_learning.miners"):
        monkeypatch.setitem(sys.modules, module, None)
    if name not in (MethodName.supcon, MethodName.triplet):
        learner(smooth(), configuration(name))
        return
    with pytest.raises(ConfigError, match=rf"method={name.value}: .* pip install 'graftstack\[metric\]'"):
        learner(smooth(), configuration(name))
