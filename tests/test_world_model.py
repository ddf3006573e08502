"""The world model and its losses against brute force."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from latents import OneHots
from models import combine_rewards
from tests.worlds import IMAGE, VECTORS, states


def test_world_losses_against_brute_force(make_world, make_batch):
    world = make_world(kl_free=0.0)
    batch = make_batch(world)
    reward = combine_rewards(batch["reward"], "mean")
    torch.manual_seed(1)
    losses, (deter, stoch, vectors), _, metrics = world.loss(batch, reward)
    torch.manual_seed(1)
    state = world.rssm.unpack(batch["initial"])
    embed, truth = world.encoder(batch), world.decoder.standard(batch)
    sequence = batch["action"], embed, batch["is_first"]
    again, post = world.rssm.observe(*sequence, state, lambda t, latent: truth[:, t])
    assert all(torch.equal(*parts) for parts in zip((deter, stoch, vectors), again, strict=True))
    assert torch.equal(vectors, truth)
    decoded = world.decoder.vectors(world.rssm.features((deter, stoch)))
    prior = world.rssm.prior(deter)
    assert set(losses) == {"dyn", "rep", "vector", "next_vector", "mean_vector", "reward", "cont"}
    for b in range(3):
        for t in range(5):
            own = Categorical(logits=post[b, t]), Categorical(logits=prior[b, t])
            expected = {
                "dyn": torch_kl(*own).sum(),
                "rep": torch_kl(*own).sum(),
                "vector": sum((decoded[b, t, i] - truth[b, t, i]) ** 2 for i in range(5)),
            }
            for name, value in expected.items():
                assert losses[name][b, t].item() == pytest.approx(value.item(), abs=1e-4), name
    entropy = Categorical(logits=prior).entropy().sum(-1).mean()
    assert metrics["prior_ent"].item() == pytest.approx(entropy.item(), rel=1e-4)


def expected(world, before, action):
    """What a step from a state (M, ...) leads to on average, by the formula (M, D + V)."""
    deter = world.img_step(before, action)[0]
    seen = torch.cat([deter, before[2], action.clamp(-1, 1).flatten(1)], -1)
    return torch.cat([deter, before[2] + world.drift(seen)], -1)


def awake(world, awaken):
    """The world model, with parts that say nothing at the start."""
    awaken(world.reward.head)
    nn.init.normal_(world.motion.out.weight)
    nn.init.normal_(world.drift.out.weight)
    return world


def test_losses_of_steps_against_brute_force(make_world, make_batch, awaken):
    world = awake(make_world(), awaken)
    batch = make_batch(world)
    batch["is_terminal"][1, 2] = batch["is_last"][1, 2] = batch["is_first"][1, 3] = True
    losses, state, *_ = world.loss(batch, batch["reward"].mean(-1, keepdim=True))
    latent = SimpleNamespace(**{name: getattr(world.rssm.latent, name) for name in dir(OneHots)})
    world.rssm.latent = latent
    truth = world.decoder.standard(batch)
    names = "next_vector", "mean_vector", "reward", "cont"
    for b in range(3):
        for t in range(5):
            found = {name: losses[name][b, t] for name in names}
            if t == 0 or batch["is_first"][b, t]:
                assert not any(found.values())
                continue
            before = tuple(part[b, t - 1].unsqueeze(0) for part in state)
            action = batch["action"][b, t].unsqueeze(0)
            latent.sample = lambda belief, code=state[1][b, t]: code.unsqueeze(0)
            moved, mean = world.img_step(before, action)[2], expected(world, before, action)
            alive, reward = torch.sigmoid(world.cont(mean)), batch["reward"][b, t].mean()
            wanted = {
                "next_vector": (moved - truth[b, t]).square().sum(),
                "mean_vector": (mean[0, -5:] - truth[b, t]).square().sum(),
                "reward": world.reward(mean).loss(reward.reshape(1, 1)),
                "cont": -torch.log(1 - alive if batch["is_terminal"][b, t] else alive),
            }
            for name, value in wanted.items():
                assert found[name].item() == pytest.approx(value.item(), abs=1e-4), name


def test_imagined_steps_are_foreseen_from_what_they_lead_to_on_average(
    make_world, make_batch, awaken
):
    world = awake(make_world(), awaken)
    action, imagined = 3 * make_batch(world)["action"], [tuple(x[:, 0] for x in states(world, 3))]
    for t in range(5):
        imagined.append(world.img_step(imagined[-1], action[:, t]))
    feat = torch.stack([world.features(state) for state in imagined], 1)
    reward, alive = world.foresee(feat, action)
    assert reward.shape == (3, 5, 1) and alive.shape == (3, 5)
    for t in range(5):
        mean = expected(world, imagined[t], action[:, t])
        assert torch.allclose(reward[:, t], world.reward(mean).mean, atol=1e-5)
        assert torch.allclose(alive[:, t], torch.sigmoid(world.cont(mean)), atol=1e-5)


def test_a_state_is_completed_by_what_is_seen_and_imagined_on_from_it(make_world, make_batch):
    world = make_world()
    nn.init.normal_(world.motion.out.weight)
    batch = make_batch(world)
    world.update_scales(batch)
    before = tuple(part[:, 0] for part in states(world, 3, 5))
    rows = {key: value[:, 0] for key, value in batch.items() if key != "initial"}
    action = 3 * batch["action"][:, 0]
    torch.manual_seed(1)
    state = world.obs_step(before, action, rows)
    torch.manual_seed(1)
    plain = world.rssm.obs_step(before, action, world.encoder(rows), rows["is_first"])
    assert all(torch.equal(*parts) for parts in zip(plain, state[:2], strict=True))
    assert torch.equal(state[2], world.decoder.standard(rows))
    assert torch.equal(world.features(state), torch.cat([world.rssm.features(plain), state[2]], -1))
    torch.manual_seed(1)
    later = world.img_step(state, action)
    torch.manual_seed(1)
    deter, stoch = world.rssm.img_step(state, action)
    assert torch.equal(later[0], deter) and torch.equal(later[1], stoch)
    seen = [world.rssm.features((deter, stoch)), state[2], action.clamp(-1, 1).flatten(1)]
    assert torch.allclose(later[2], state[2] + world.motion(torch.cat(seen, -1)), atol=1e-6)
    assert (later[2] - state[2]).abs().max() > 1e-3


def test_at_first_nothing_is_expected_to_move(make_world, make_batch):
    world = make_world()
    vectors, action = torch.randn(3, 5), make_batch(world)["action"][:, 0]
    assert torch.equal(world.move(vectors, torch.randn(3, world.rssm.feat), action), vectors)


@pytest.mark.parametrize("seen", [IMAGE, {"agent0": VECTORS["agent0"]}])
def test_vectors_that_are_not_seen_are_read_off_what_is_and_off_memory(
    make_world, make_batch, seen
):
    world = make_world(obs_shapes=seen, predicted_shapes=VECTORS)
    nn.init.normal_(world.sight.memory.out.weight)
    batch = make_batch(world, **VECTORS, **IMAGE)
    losses, state, *_ = world.loss(batch, combine_rewards(batch["reward"], "mean"))
    embed, own = world.encoder(batch), world.rssm.features(state[:2])
    read = world.sight.glimpse(embed) + world.sight.memory(torch.cat([embed, own], -1))
    assert torch.allclose(state[2], read, atol=1e-5) and not state[2].requires_grad
    completed = world.complete(state[:2], world.seen(batch, embed), embed)
    assert torch.allclose(completed, state[2], atol=1e-5)
    error = (read - world.decoder.standard(batch)).square().sum(-1)
    assert torch.allclose(losses["embed"], error, rtol=1e-4)


def test_what_is_only_predicted_is_never_seen(make_world, make_batch):
    world = make_world(obs_shapes=IMAGE, predicted_shapes=IMAGE | VECTORS)
    batch = make_batch(world, **VECTORS, **IMAGE)
    blind = batch | {key: torch.full_like(batch[key], torch.nan) for key in VECTORS}
    torch.manual_seed(1)
    state = world.states(batch)
    torch.manual_seed(1)
    again = world.states(blind)
    assert all(torch.equal(*parts) for parts in zip(state, again, strict=True))
    losses, state, *_ = world.loss(batch, combine_rewards(batch["reward"], "mean"))
    assert {"vector", "embed", "image", "next_vector"} <= set(losses)
    assert world.features(state).shape[-1] == world.rssm.feat + 5


def test_open_loop_observes_five_steps_and_dreams_the_rest(make_world, make_batch):
    world = make_world()
    nn.init.normal_(world.motion.out.weight)
    batch = make_batch(world, time=9)
    torch.manual_seed(1)
    feat = world.open_loop(batch)
    blind = {key: value.clone() for key, value in batch.items() if key != "initial"}
    blind["agent0"][:, 5:] = torch.nan
    torch.manual_seed(1)
    assert torch.equal(world.open_loop(blind | {"initial": batch["initial"]}), feat)
    torch.manual_seed(1)
    state = world.rssm.initial(3)
    embed, truth = world.encoder(batch), world.decoder.standard(batch)
    with torch.no_grad():
        for t in range(9):
            action = batch["action"][:, t]
            if t < 5:
                latent = world.rssm.obs_step(state, action, embed[:, t], batch["is_first"][:, t])
                vectors = truth[:, t]
            else:
                latent = world.rssm.img_step(state, action)
                vectors = world.move(vectors, world.rssm.features(latent), action)
            state = *latent, vectors
            expected = torch.cat([world.rssm.features(latent), vectors], -1)
            assert torch.allclose(feat[:, t], expected, atol=1e-5)
