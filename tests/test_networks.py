"""Heads, the RSSM and the stacked actors, against plain reimplementations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers import PairMLP
from networks import RSSM, Actors, Head, TeamHead, TeamView

SIZES = (1, 3, 2)  # action widths of three agents


# ---- heads ---------------------------------------------------------------------------------------


def test_heads_shape_their_output():
    assert Head(6, 8, 1, (), scale=1.0)(torch.randn(4, 5, 6)).shape == (4, 5)
    head = Head(6, 8, 2, (2, 3), scale=1.0)
    x = torch.randn(4, 5, 6)
    assert head(x).shape == (4, 5, 2, 3)
    expected = (head.body(x) @ head.out.weight.T).view(4, 5, 2, 3)
    assert torch.allclose(head(x), expected, atol=1e-6)


def test_a_team_view_is_the_maximum_over_agents_of_a_kind():
    view, vectors = TeamView([[3], [2], [3]], 8), torch.randn(5, 4, 8)
    wide, narrow = view.mlps
    assert view.outputs == 2 * 8 + (2 + 1) * PairMLP.SEEN
    one, other, last = vectors.split([3, 2, 3], -1)
    both = zip(wide(one), wide(last), strict=True)
    expected = torch.cat([*(torch.maximum(*parts) for parts in both), *narrow(other)], -1)
    each, pooled = view(vectors)
    assert torch.allclose(pooled, expected, atol=1e-6)
    assert each.shape == (5, 4, 3, 8)
    views = each.unbind(-2)
    for view_of, mlp, vector in zip(views, (wide, narrow, wide), (one, other, last), strict=True):
        assert torch.allclose(view_of, mlp(vector)[0], atol=1e-6)
    swapped = torch.cat([last, other, one], -1)
    assert torch.allclose(view(swapped)[1], expected, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_agents_numbers_come_from_one_head_that_is_shown_who_asks(awaken, layers):
    head, feat = TeamHead(6 + 7, [[2], [3], [2]], 8, layers, 3), torch.randn(4, 5, 13)
    awaken(head.head)
    found = head(feat)
    assert found.logits.shape == (4, 5, 3, 255)
    each, pooled = head.view(feat[..., 6:])
    first = torch.cat([head.joint.weight, head.own.weight], 1)
    for agent, who in enumerate(torch.eye(3)):
        parts = feat[..., :6], pooled, each[..., agent, :], who.expand(4, 5, 3)
        hidden = norm_silu(torch.cat(parts, -1) @ first.T + head.joint.bias)
        expected = head.head(hidden).mean[..., 0]
        assert torch.allclose(found.mean[..., agent], expected, atol=1e-5)


@pytest.mark.parametrize("parts", [[], [[2], [3]]])
def test_a_team_head_sees_the_state_and_the_vectors_at_its_end(awaken, parts):
    head, feat = TeamHead(6 + 5 * bool(parts), parts, 8, 1, 2), torch.randn(4, 6 + 5 * bool(parts))
    assert torch.equal(head(feat).mean, torch.zeros(4, 2))
    awaken(head.head)
    before = head(feat).mean
    for column in range(feat.shape[1]):
        changed = feat.clone()
        changed[0, column] += 3.0
        same = (head(changed).mean == before).all(-1)
        assert same.tolist() == [False, True, True, True], column


# ---- RSSM ----------------------------------------------------------------------------------------


@pytest.fixture
def rssm():
    return RSSM(embed=7, actions=6, deter=12, stoch=3, classes=4, units=10, blocks=3, vectors=2)


def random_state(rssm, batch):
    stoch = F.one_hot(torch.randint(0, 4, (batch, 3)), 4).float()
    return torch.randn(batch, rssm.deter), stoch, torch.randn(batch, rssm.vectors)


def observe(rssm, action, embed, is_first, state):
    """As `RSSM.observe`, with the first numbers of embeddings as vectors of the scene."""
    return rssm.observe(action, embed, is_first, state, lambda t, latent: embed[:, t, :2])


def norm_silu(x):
    return F.silu(x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt())


@pytest.mark.parametrize("norm", [True, False])
def test_rssm_memory_is_dreamers_block_gru(norm):
    """Each block sees its own memory and all inputs, and has its own three gates.

    Inputs are memory, code, and the action beside the vectors that it was taken in.
    """
    rssm = RSSM(7, 6, deter=12, stoch=3, classes=4, units=10, blocks=3, norm=norm, vectors=2)
    squash = norm_silu if norm else F.silu
    nn.init.normal_(rssm.gates_bias)
    nn.init.normal_(rssm.core_shared.bias)
    (deter, stoch, vectors), action = random_state(rssm, 5), torch.randn(5, 2, 3)
    bounded = action.flatten(1) / action.flatten(1).abs().clamp(min=1)
    inputs = torch.cat(
        [
            squash(deter @ rssm.from_deter[0].weight.T),
            squash(stoch.flatten(1) @ rssm.from_stoch[0].weight.T),
            squash(torch.cat([bounded, vectors], -1) @ rssm.from_scene[0].weight.T),
        ],
        -1,
    )
    blocks = [slice(4 * k, 4 * k + 4) for k in range(3)]
    hidden = []
    for k, own in enumerate(blocks):
        weight, bias = rssm.core_shared.weight[own], rssm.core_shared.bias[own]
        hidden.append(deter[:, own] @ rssm.core_own.weight[k] + inputs @ weight.T + bias)
    hidden = squash(torch.cat(hidden, -1))
    expected = []
    for k, own in enumerate(blocks):
        gates = hidden[:, own] @ rssm.gates.weight[k] + rssm.gates_bias[12 * k : 12 * k + 12]
        reset, candidate, update = gates[:, :4], gates[:, 4:8], gates[:, 8:]
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        expected.append(update * candidate + (1 - update) * deter[:, own])
    result, _ = rssm.img_step((deter, stoch, vectors), action)
    assert torch.allclose(result, torch.cat(expected, -1), atol=1e-5)


def test_img_step_draws_from_the_prior(rssm):
    state = random_state(rssm, 1)
    many = tuple(part.expand(20_000, *part.shape[1:]) for part in state)
    deter, stoch = rssm.img_step(many, torch.zeros(20_000, 2, 3))
    assert torch.allclose(stoch.mean(0), rssm.prior(deter[0]).exp(), atol=0.02)
    logits = rssm.prior_head(deter[0])
    assert torch.allclose(rssm.prior(deter[0]).exp(), 0.99 * logits.softmax(-1) + 0.0025)


def sequence(rssm, batch=3, time=6):
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    return torch.randn(batch, time, 2, 3), torch.randn(batch, time, 7), is_first


def test_observe_equals_steps_of_obs_step(rssm):
    action, embed, is_first = sequence(rssm)
    is_first[0, 0] = is_first[1, 3] = True
    state = first = random_state(rssm, 3)
    torch.manual_seed(1)
    (deter, stoch, vectors), _ = observe(rssm, action, embed, is_first, first)
    assert torch.equal(vectors, embed[..., :2])
    torch.manual_seed(1)
    for t in range(6):
        latent = rssm.obs_step(state, action[:, t], embed[:, t], is_first[:, t])
        state = *latent, embed[:, t, :2]
        assert torch.allclose(deter[:, t], state[0], atol=1e-6)
        assert torch.allclose(stoch[:, t], state[1], atol=1e-6)


def test_posterior_comes_from_memory_and_observation(rssm):
    action, embed, is_first = sequence(rssm, time=1)
    (deter, *_), post = observe(rssm, action, embed, is_first, random_state(rssm, 3))
    mixed = deter @ rssm.post_deter.weight.T + embed @ rssm.post_embed.weight.T
    logits = (norm_silu(mixed) @ rssm.post_head[1].weight.T).view(3, 1, 3, 4)
    assert torch.allclose(post.exp(), 0.99 * logits.softmax(-1) + 0.0025, atol=1e-5)


def test_a_reset_forgets_what_came_before(rssm):
    """State, action that led there, and earlier observations: none of it may leak."""
    action, embed, is_first = sequence(rssm)
    is_first[1, 3] = True
    one, other = random_state(rssm, 3), random_state(rssm, 3)
    torch.manual_seed(1)
    before = observe(rssm, action, embed, is_first, one)[0]
    action[:, :4], embed[:, :3] = 5.0, -5.0
    torch.manual_seed(1)
    after = observe(rssm, action, embed, is_first, other)[0]
    for left, right in zip(before, after, strict=True):
        assert torch.equal(left[1, 3:], right[1, 3:])
    assert not torch.allclose(before[0][1, 2], after[0][1, 2])
    # Without a reset, the past does matter.
    assert not torch.allclose(before[0][0, 3:], after[0][0, 3:])


def test_a_reset_starts_from_the_initial_state(rssm):
    action, embed, is_first = sequence(rssm, time=1)
    state = random_state(rssm, 3)
    torch.manual_seed(1)
    reset, _ = observe(rssm, action, embed, ~is_first, state)
    torch.manual_seed(1)
    fresh, _ = observe(rssm, torch.zeros_like(action), embed, is_first, rssm.initial(3))
    for left, right in zip(reset, fresh, strict=True):
        assert torch.equal(left, right)


def test_the_action_before_a_step_matters(rssm):
    action, embed, is_first = sequence(rssm)
    (deter, *_), _ = observe(rssm, action, embed, is_first, rssm.initial(3))
    state = rssm.initial(3)
    expected, _ = rssm.img_step(state, action[:, 0])
    assert torch.allclose(deter[:, 0], expected, atol=1e-6)


def test_pack_and_unpack_round_trip(rssm):
    state = random_state(rssm, 5)
    packed = rssm.pack(state)
    assert packed["deter"].dtype == torch.float16 and packed["stoch"].dtype == torch.uint8
    assert torch.equal(packed["stoch"].long(), state[1].argmax(-1))
    deter, stoch, vectors = rssm.unpack(packed)
    assert torch.allclose(vectors, state[2], rtol=1e-3, atol=1e-6)
    assert deter.dtype == stoch.dtype == torch.float32
    assert torch.equal(stoch, state[1]) and torch.allclose(deter, state[0], rtol=1e-3, atol=1e-6)
    again = rssm.pack((deter, stoch, vectors))
    assert all(torch.equal(again[key], packed[key]) for key in packed)


def test_features_hold_memory_and_categories(rssm):
    state = random_state(rssm, 5)
    feat = rssm.features(state[:2])
    assert feat.shape == (5, rssm.feat)
    assert torch.equal(feat[:, :12], state[0]) and torch.equal(feat[:, 12:].view(5, 3, 4), state[1])


def test_bound_action_clips_with_a_gradient():
    action = torch.tensor([-4.0, -1.0, -0.3, 0.0, 0.9, 1.0, 2.0], requires_grad=True)
    bounded = RSSM.bound_action(action)
    assert torch.equal(bounded, action.clamp(-1, 1))
    bounded.sum().backward()
    assert torch.allclose(action.grad, torch.tensor([0.25, 1, 1, 1, 1, 1, 0.5]))


# ---- actors --------------------------------------------------------------------------------------


def make_actors(discrete, sizes=SIZES):
    actors = Actors(9, sizes, discrete, units=8, layers=2)
    for parameter in actors.parameters():  # away from the near-zero start, norms included
        nn.init.normal_(parameter, std=0.7)
    return actors


def single(actors, agent, size):
    """A team of one with the weights of one agent of the stack."""
    own = Actors(9, (size,), actors.discrete, units=8, layers=2)
    outputs = torch.arange(size)
    if not actors.discrete:  # means, then widths
        outputs = torch.cat([outputs, actors.mask.shape[1] + outputs])
    state = {}
    for name, value in actors.state_dict().items():
        if not name.startswith("joint."):  # which all actors share
            value = value[agent : agent + 1]
        last = name.startswith(f"body.{len(actors.body) - 1}.")
        state[name] = value[..., outputs] if last else value
    own.load_state_dict(state)
    return own


@pytest.mark.parametrize("discrete", [False, True])
def test_stacked_actors_equal_a_loop_of_single_ones(discrete):
    actors, feat = make_actors(discrete), torch.randn(4, 5, 9)
    policy = actors(feat)
    action = policy.sample()
    assert action.shape == (4, 5, 3, 3) and actors(feat[0, 0:1]).mode.shape == (1, 3, 3)
    assert (action * (1 - actors.mask) == 0).all()
    for agent, size in enumerate(SIZES):
        own = single(actors, agent, size)(feat)
        assert own.mode.shape == (4, 5, 1, size)
        assert torch.allclose(policy.mode[:, :, agent, :size], own.mode[:, :, 0], atol=1e-5)
        log_prob = own.log_prob(action[:, :, agent : agent + 1, :size])
        assert torch.allclose(policy.log_prob(action)[..., agent], log_prob[..., 0], atol=1e-4)
        assert torch.allclose(policy.entropy()[..., agent], own.entropy()[..., 0], atol=1e-4)


@pytest.mark.parametrize("discrete", [False, True])
def test_each_actor_sees_its_own_vector_and_what_all_amount_to(discrete):
    parts, feat = [[2], [3], [2]], torch.randn(4, 5, 9)
    actors = Actors(9, SIZES, discrete, units=8, layers=2, parts=parts)
    nn.init.normal_(actors.own.bias)
    each, pooled = actors.view(feat[..., -7:])
    shared = actors.joint(torch.cat([feat, pooled], -1))
    for agent, view in enumerate(each.unbind(-2)):
        own = shared + view @ actors.own.weight[agent] + actors.own.bias[agent]
        expected = actors.body(own.flatten(0, 1).expand(3, -1, -1))[agent].unflatten(0, (4, 5))
        mode = actors(feat).mode[..., agent, :]
        if discrete:
            allowed = expected.masked_fill(actors.mask[agent] == 0, -torch.inf)
            assert (mode.argmax(-1) == allowed.argmax(-1)).all(), agent
        else:
            mean = expected[..., :3].tanh() * actors.mask[agent]
            assert torch.allclose(mode, mean, atol=1e-5), agent


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, (1, 1, 1), (2, 2, 2)])
def test_log_prob_is_of_the_own_action_alone(discrete, sizes):
    policy = make_actors(discrete, sizes)(torch.randn(6, 9))
    for agent in range(3):
        action = policy.sample().detach().requires_grad_()
        policy.log_prob(action)[:, agent].sum().backward(retain_graph=True)
        reached = action.grad.abs().sum((0, 2)) > 0
        alone = [other == agent for other in range(3)]
        if discrete and sizes[agent] == 1:
            alone = [False] * 3  # the only action has probability one
        assert reached.tolist() == alone


@pytest.mark.parametrize("discrete", [False, True])
def test_each_policy_depends_on_its_own_weights_alone(discrete):
    """Beside the first layer, which all share."""
    actors = make_actors(discrete, (2, 2, 2))
    policy = actors(torch.randn(6, 9))
    for agent in range(3):
        loss = policy.entropy()[:, agent].sum()
        grads = torch.autograd.grad(loss, list(actors.body.parameters()), retain_graph=True)
        assert all((grad.flatten(1).abs().sum(1) > 0).tolist()[agent] for grad in grads[:-1])
        for grad in grads:
            assert grad[[other for other in range(3) if other != agent]].abs().max() == 0


def test_new_actors_are_undecided():
    feat = torch.randn(64, 9)
    assert Actors(9, SIZES, False, 8, 2)(feat).mode.abs().max() < 0.5
    entropy = Actors(9, SIZES, True, 8, 2)(feat).entropy().mean(0)
    assert torch.allclose(entropy, torch.tensor(SIZES).log(), atol=0.05)
