"""What the engine says of itself follows what was done, in every form it is said in."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import dpkit
from dpkit.accountants import (
    ApproximateDP,
    DiscreteGaussian,
    Gaussian,
    PLDAccountant,
    PoissonSampled,
    TradeOff,
    rounding,
)
from dpkit.statement import Statement
from tests.lives import Life, begin
from tests.test_refusals import refused
from tests.training import Run, attach, data, mlp, train, work

STEP = PoissonSampled(0.5, Gaussian(1.0))


def run(**options: Any) -> Run:
    return attach(mlp(), data(), 4, **{"noise_multiplier": 1.0, "target_delta": 1e-5, **options})


def on(engine: dpkit.PrivacyEngine, **options: Any) -> Run:
    """Attach an engine that is there to a model of its own."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data(), batch_size=4, **options.pop("loader", {}))
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-5, **options}
    return Run(engine, *engine.make_private(model, optimizer, loader, **options))


def trained(**options: Any) -> Statement:
    life = run(**options)
    train(life)
    return life.engine.statement()


def checked(said: Statement) -> dict[str, str]:
    return {a.text: a.checked for a in said.assumptions}


def how(said: Statement, word: str) -> str:
    """How the one assumption that speaks of ``word`` was checked."""
    [found] = [checked for text, checked in checked(said).items() if word in text]
    return found


# --- numbers ---


def test_the_numbers_are_the_accountants() -> None:
    """ε at the δ that is asked for, what was counted, σ and q from there, C of now."""
    life = run(accountant="pld")
    train(life, 2)
    life.engine.noise_multiplier, life.engine.max_grad_norm = 2.5, 0.25
    train(life)
    said = life.engine.statement()
    assert (said.epsilon, said.delta) == (life.engine.get_epsilon(1e-5), 1e-5)
    judge = PLDAccountant().compose(STEP, 4).compose(PoissonSampled(0.5, Gaussian(2.5)), 2)
    assert said.events == judge.ledger == life.engine.accountant.ledger
    assert (said.epsilon_lower, said.epsilon) == judge.epsilon_bounds(1e-5)
    assert 0 < said.epsilon_lower < said.epsilon < said.epsilon_lower * (1 + 1e-3)
    assert said.strength.advantage == pytest.approx(TradeOff(judge).advantage, rel=1e-4)
    assert dict(said.strength.tpr)[0.01] == pytest.approx(TradeOff(judge).tpr(0.01), rel=1e-4)
    assert (said.releases, said.units, said.unit) == (6, 8, "record")
    assert (said.max_grad_norm, said.expected_batch_size) == (0.25, 4.0)
    assert life.engine.statement(1e-3).epsilon == life.engine.get_epsilon(1e-3) < said.epsilon
    assert "4 × Gaussian noise, σ = 1, q = 0.5" in str(said)
    assert "2 × Gaussian noise, σ = 2.5, q = 0.5" in str(said)
    assert "adding or removing one record" in said.neighbours


def test_a_long_schedule_is_told_in_a_few_lines() -> None:
    """By its range, and the number of its steps; JSON has every one."""
    steps = [(PoissonSampled(0.5, Gaussian(1.0 + k / 100)), k + 1) for k in range(40)]
    said = replace(trained(), events=(*steps, (Gaussian(3.0), 2), (ApproximateDP(0.5, 1e-7), 7)))
    for text in (str(said), said.markdown()):
        assert text.count("Accounted") == 3
        assert "820 × Gaussian noise, σ from 1 to 1.39, q = 0.5" in text
        assert "2 × Gaussian noise, σ = 3, everybody taking part" in text
        assert "7 × ApproximateDP" in text
    assert len(said.to_dict()["accounting"]["events"]) == 42
    several = replace(said, events=tuple((ApproximateDP(k / 100, 0.0), 2) for k in range(12)))
    assert str(several).count("Accounted") == 9
    assert "8 more, of 4 other kinds" in str(several)


def test_the_looser_accountant_is_bounded_from_below_too() -> None:
    said = trained(accountant="rdp")
    assert said.accountant == "RDPAccountant"
    assert said.epsilon_lower < 0.99 * said.epsilon
    assert said.verify()[1] < said.epsilon


def test_before_the_first_step_nothing_is_spent() -> None:
    said = run().engine.statement()
    assert (said.epsilon, said.epsilon_lower, said.releases, said.events) == (0.0, 0.0, 0, ())
    assert said.strength.advantage == 0.0
    assert dict(said.strength.tpr)[0.01] == pytest.approx(0.01)
    assert "nothing yet" in str(said)


@given(value=st.floats(1e-12, 1e6), digits=st.integers(1, 9))
@example(value=1.00000001, digits=4)
@example(value=9.9996, digits=4)
@example(value=0.1, digits=1)
def test_bounds_are_rounded_to_their_side(value: float, digits: int) -> None:
    up, down = float(rounding.up(value, digits)), float(rounding.down(value, digits))
    assert down <= value <= up
    assert up - down <= 10.0 ** (2 - digits) * value


def test_a_rounded_epsilon_still_holds() -> None:
    """What is printed of ε is not below it, what is printed of its lower bound not above."""
    said = replace(trained(accountant="pld"), epsilon=1.00011, epsilon_lower=0.99999)
    for text in (str(said), said.markdown()):
        assert "(1.001, 1e-05)" in text
        assert "at most 1.001" in text
        assert "0.9999 (of the mechanism" in text


def test_without_noise_nothing_is_promised() -> None:
    said = trained(noise_multiplier=0.0)
    assert said.epsilon == said.epsilon_lower == math.inf
    assert said.strength.advantage == 1.0
    for text in (str(said), said.markdown()):
        assert "NOT differentially private" in text
        assert "Without noise nothing is promised" in text
    assert Statement.from_json(said.json()) == said
    assert said.verify() == (math.inf, math.inf)


# --- what was done, and what was checked ---


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("draws", [False, True])
def test_what_was_seeded_by_hand_is_labelled(noise: bool, draws: bool) -> None:
    """Of noise and draws, whichever was; and nothing where nothing was."""
    options: dict[str, Any] = {"noise_generator": torch.Generator().manual_seed(1)} if noise else {}
    if draws:
        options["loader"] = {"generator": torch.Generator().manual_seed(2)}
    said = run(**options).engine.statement()
    assert said.seeded == ("noise",) * noise + ("draws",) * draws
    for text in (str(said), said.markdown()):
        assert ("SEEDED BY HAND" in text) == (noise or draws)
        assert "SEEDED BY HAND: noise and draws" in text or not (noise and draws)


def test_other_samplings_and_units() -> None:
    fixed = trained(poisson_sampling=False, loader={"generator": torch.Generator().manual_seed(0)})
    assert "zeroing out one record" in fixed.neighbours
    assert (fixed.sampling, fixed.adjacency) == ("fixed batches", "zero_out")
    assert not fixed.seeded  # who is in a batch is no secret there
    assert (fixed.releases, fixed.events) == (2, ((Gaussian(1.0), 1),))
    ordered = run(poisson_sampling=False, noise=dpkit.BufferedNoise()).engine.statement()
    assert "zeroing out" in ordered.neighbours
    assert "BufferedNoise" in ordered.noise
    turns = run(noise=dpkit.BandedNoise(2)).engine.statement()
    assert "adding or removing" in turns.neighbours
    assert "cyclic Poisson" in turns.sampling
    units = run(privacy_unit=[0, 0, 0, 1, 2, 2, 3, 3], max_rows_per_unit=2, augmentations=3).engine
    said = units.statement()
    assert said.neighbours == f"differ by adding or removing one {units._loader.units.name}"
    assert (said.unit, said.units) == (units._loader.units.name, 4)
    assert said.unit != "record"
    assert "at most 2 rows" in said.sampling
    assert "read 3 times" in said.sampling


def test_zeroing_out_costs_no_less_than_is_stated() -> None:
    """What was added by hand may cost more under the adjacency of fixed batches; what the engine does, does not."""
    life = run(poisson_sampling=False, accountant="pld")
    train(life)
    assert life.engine.statement().epsilon == life.engine.get_epsilon()
    life.engine.accountant.compose(PoissonSampled(0.1, Gaussian(1.5)), 20)
    said = life.engine.statement()
    judge = PLDAccountant("zero_out").compose(Gaussian(1.0)).compose(PoissonSampled(0.1, Gaussian(1.5)), 20)
    assert said.epsilon >= judge.epsilon(1e-5)
    said.verify()


def test_assumptions_follow_what_was_checked() -> None:
    plain, strict = run(), run(accountant="pld")
    assert not how(plain.engine.statement(), "treats every record")
    assert not how(plain.engine.statement(), "gradient is the one")
    train(plain)
    for x, y in strict.loader:
        strict.engine.backward((strict.model(x) - y).square().mean(1))
        strict.optimizer.step()
    said, other = plain.engine.statement(), strict.engine.statement()
    assert "gradient moved with" in how(said, "one loss a record")
    assert "one by one" in how(other, "one loss a record")
    assert "measured" in how(said, "treats every record")
    assert "4 of 4 trainable tensors" in how(said, "gradient is the one")
    assert not how(said, "last bits")
    assert not how(said, "repeated from an earlier state")
    assert how(said, "fixed in advance")
    plain.engine.noise_multiplier = 2.0
    train(plain)
    assert not how(plain.engine.statement(), "fixed in advance")
    text = str(said)
    checked_part, rest = text.split("Assumptions that were not checked")
    for a in said.assumptions:
        assert (a.text in checked_part) == bool(a.checked)
        assert (a.text in rest) == (not a.checked)
    for scope in (*said.covered, *said.left_out):
        assert scope.text in text
    for topic in ("hyper-parameters", "statistics", "early stopping"):
        assert topic in {s.topic for s in said.left_out}


def test_secure_mode_and_ledger_take_less_for_granted(tmp_path: Path) -> None:
    life = on(dpkit.PrivacyEngine(secure_mode=True, ledger=tmp_path / "ledger"), max_epsilon=50.0)
    train(life)
    said = life.engine.statement()
    assert "AES-256" in said.noise
    assert how(said, "last bits")
    assert how(said, "repeated from an earlier state")
    assert said.max_epsilon == 50.0
    assert "hard budget" in {s.topic.removeprefix("stopping at the ") for s in said.covered}
    assert (said.runs, said.epsilon_of_runs) == (1, said.epsilon)
    other = on(dpkit.PrivacyEngine(ledger=tmp_path / "ledger"))
    train(other)
    said = life.engine.statement()
    assert said.runs == 2
    assert said.epsilon_of_runs == PLDAccountant().compose(STEP, 4).epsilon(1e-5) > said.epsilon
    assert "All runs in the ledger" in str(said)


def test_a_large_delta_is_a_caution() -> None:
    engine = run().engine
    assert not engine.statement(0.1).cautions
    [caution] = engine.statement(0.125).cautions
    assert "1 / N = 0.125" in caution
    assert caution in str(engine.statement(0.125))


def test_what_was_added_by_hand_is_told_apart(tmp_path: Path) -> None:
    """Of events that dpkit did not see happen, how many there are; also after a checkpoint."""
    life = run(poisson_sampling=False)
    train(life, 2)
    assert life.engine.statement().releases == 4
    assert not life.engine.statement().cautions  # two of the releases were paid for by the two others
    life.engine.accountant.compose(Gaussian(9.0), 3)
    life.engine.save_checkpoint(tmp_path / "c")
    again = run(poisson_sampling=False)
    again.engine.load_checkpoint(tmp_path / "c")
    train(again)
    for said in (life.engine.statement(), dpkit.statement_of(tmp_path / "c"), again.engine.statement()):
        [caution] = said.cautions
        assert caution.startswith("3 of the events were counted as told")


# --- several lives of one engine ---


def test_the_least_that_is_true_of_all_lives() -> None:
    """What an engine did before it was attached again counts, and so do its seeds, its sampling and its checks."""
    engine = dpkit.PrivacyEngine()
    first = on(engine, poisson_sampling=False, noise_generator=torch.Generator().manual_seed(1))
    train(first)
    engine.detach()
    said = engine.statement(1e-5)  # detached, and still to be told
    assert (said.releases, said.seeded) == (2, ("noise",))
    second = on(engine)
    assert engine.statement() == said  # nothing was released since
    for x, y in second.loader:
        engine.backward((second.model(x) - y).square().mean(1))
        second.optimizer.step()
    said = engine.statement()
    assert "zeroing out" in said.neighbours
    assert said.seeded == ("noise",)
    assert "one by one" not in how(said, "one loss a record")
    assert said.sampling == "fixed batches; in other parts: Poisson sampling"
    assert said.epsilon == engine.get_epsilon()
    said.verify()


def test_a_life_without_releases_is_not_told() -> None:
    engine = dpkit.PrivacyEngine()
    on(engine, noise_generator=torch.Generator().manual_seed(1))
    engine.detach()
    train(on(engine))
    assert not engine.statement().seeded


def test_other_units_in_other_lives_are_refused() -> None:
    engine = dpkit.PrivacyEngine()
    train(on(engine))
    engine.detach()
    train(on(engine, privacy_unit=[0, 0, 1, 1, 2, 2, 3, 3]))
    with refused(dpkit.ConfigurationError, "several units of privacy", "record"):
        engine.statement()


# --- from a checkpoint ---


def test_from_a_checkpoint(tmp_path: Path) -> None:
    """The same statement, from the file alone; and from a process that has no model."""
    life = run(accountant="pld", noise_generator=torch.Generator().manual_seed(1))
    for k, batch in enumerate(life.loader):
        work(life, batch)
        if k == 0:
            life.engine.save_checkpoint(tmp_path / "c")
            said = life.engine.statement()
    assert dpkit.statement_of(tmp_path / "c") == said != life.engine.statement()
    assert dpkit.statement_of(tmp_path / "c", 1e-3).epsilon < said.epsilon
    code = f"import dpkit; print(dpkit.statement_of({str(tmp_path / 'c')!r}).json())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert Statement.from_json(done.stdout) == said


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    """What was seeded, and what was not checked, before the interruption."""
    life = run(loader={"generator": torch.Generator().manual_seed(1)})
    train(life)
    life.engine.save_checkpoint(tmp_path / "c")
    life.engine.detach()
    again = run()
    again.engine.load_checkpoint(tmp_path / "c", replay=False)
    assert again.engine.statement() == dpkit.statement_of(tmp_path / "c")
    train(again)
    said = again.engine.statement()
    assert (said.seeded, said.releases) == (("draws",), 4)
    again.engine.save_checkpoint(tmp_path / "d")
    assert dpkit.statement_of(tmp_path / "d") == said


def test_a_checkpoint_before_the_first_step_tells_of_no_life(tmp_path: Path) -> None:
    life = run(loader={"generator": torch.Generator().manual_seed(1)})
    life.engine.save_checkpoint(tmp_path / "c")
    assert dpkit.statement_of(tmp_path / "c").epsilon == 0.0
    again = run()
    again.engine.load_checkpoint(tmp_path / "c")
    train(again)
    assert not again.engine.statement().seeded


def test_what_a_checkpoint_cannot_tell(tmp_path: Path) -> None:
    life = run(target_delta=None)
    life.engine.save_checkpoint(tmp_path / "c")
    with refused(dpkit.ConfigurationError, "no delta was given"):
        dpkit.statement_of(tmp_path / "c")
    with refused(dpkit.CheckpointError, "cannot be read"):
        dpkit.statement_of(tmp_path / "none")
    held = life.engine.state_dict()
    old = {**held, "about": {"lives": [{"unit": "record"}], "target_delta": 1e-5}}
    dpkit.checkpoint.save(tmp_path / "old", {"state": old, "also": {}, "extra": None})
    with refused(dpkit.CheckpointError, "does not tell what its run promises"):
        dpkit.statement_of(tmp_path / "old")
    before = life.engine.statement(1e-5)
    with refused(dpkit.CheckpointError, "does not tell of its run"):
        life.engine.load_state_dict({**old, "spending": {**held["spending"], "released": 1}})
    assert life.engine.statement(1e-5) == before


def test_a_killed_and_resumed_run_states_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = begin().train()
    life = begin(ledger=tmp_path / "l")

    def killed(life: Life) -> bool:
        if life.steps == 4:
            life.save(tmp_path / "c")
        return life.steps == 6

    life.train(killed)
    life.engine.detach()
    again = begin(ledger=tmp_path / "l")
    again.load(tmp_path / "c")
    again.train()
    said, other = again.engine.statement(), whole.engine.statement()
    assert (said.epsilon, said.events, said.releases) == (other.epsilon, other.events, other.releases)


# --- JSON, Markdown, model card ---


def some() -> Statement:
    return trained(
        accountant="pld", privacy_unit=[0, 0, 1, 1, 2, 2, 3, 3], noise_generator=torch.Generator().manual_seed(1)
    )


def test_json_round_trip() -> None:
    said = some()
    for event in (ApproximateDP(0.5, 1e-7), DiscreteGaussian(2.0, 3)):
        said = replace(said, events=(*said.events, (event, 2)))
    assert Statement.from_json(said.json()) == said
    assert Statement.from_dict(said.to_dict()) == said
    assert json.loads(said.json()) == said.to_dict()
    assert said.to_dict()["schema_version"] == 1
    assert said.to_dict()["guarantee"]["epsilon"] == said.epsilon  # every digit


def test_json_of_another_kind_is_refused() -> None:
    good = some().to_dict()
    for bad, word in (
        ({**good, "schema_version": 2}, "schema version 2"),
        ({**good, "schema": "card"}, "no statement"),
        ({**good, "more": 1}, "not known"),
        ({**good, "guarantee": {**good["guarantee"], "zeta": 3}}, "not known"),
        ({k: v for k, v in good.items() if k != "mechanism"}, "not understood"),
        ({**good, "accounting": {**good["accounting"], "events": [{"event": {"kind": "Magic"}, "count": 1}]}}, "Magic"),
        ([good], "no statement"),
    ):
        with refused(dpkit.ConfigurationError, word):
            Statement.from_dict(bad)
    with refused(dpkit.ConfigurationError, "no JSON"):
        Statement.from_json("{")


def test_an_embellished_statement_is_found_out() -> None:
    said = some()
    assert said.verify() == (said.epsilon_lower, said.epsilon)
    with refused(dpkit.ConfigurationError, "costs at least"):
        replace(said, epsilon=said.epsilon_lower * 0.999).verify()
    with refused(dpkit.ConfigurationError, "costs at least"):
        replace(said, events=(*said.events, (Gaussian(2.0), 1))).verify()
    with refused(dpkit.ConfigurationError, "advantage"):
        replace(said, strength=replace(said.strength, advantage=0.5 * said.strength.advantage)).verify()
    tpr = tuple((fpr, 0.99 * value) for fpr, value in said.strength.tpr)
    with refused(dpkit.ConfigurationError, "true-positive rate"):
        replace(said, strength=replace(said.strength, tpr=tpr)).verify()
    with refused(dpkit.ConfigurationError, "costs at least"):
        replace(trained(noise_multiplier=0.0), epsilon=3.0).verify()


def cells(line: str) -> list[str]:
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


NASTY = "user|id`\n---\n# <b>*x*: \"no\" 'y' \\ {a: 1} [l](u) ~~z~~\x1b[31m"


def test_markdown_and_card_survive_any_name() -> None:
    """Two cells a row, no headings but ours, no raw HTML; the YAML header reads back."""
    said = replace(some(), unit=NASTY, neighbours=f"differ by adding or removing one {NASTY}")
    text = said.markdown(level=3)
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(cells(line)) for line in table} == {2}
    headings = [line for line in lines if re.match(r"\s*#", line)]
    assert headings[0] == "### Privacy guarantee"
    assert {h.split(" ")[0] for h in headings[1:]} == {"####"}
    assert "---" not in lines
    assert not re.search(r"(?<!\\)[<`*]", text)
    assert "\x1b" not in text + str(said)
    card = said.model_card(front_matter=True)
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    read = yaml.safe_load(header)
    assert read["tags"] == ["differential-privacy", "dp-sgd"]
    assert read["differential_privacy"] == {
        "epsilon": said.epsilon,
        "delta": said.delta,
        "adjacency": said.adjacency,
        "unit": NASTY,
        "accountant": said.accountant,
        "releases": said.releases,
    }
    assert body.strip() == said.markdown().strip() == said.model_card().strip()
    nothing = replace(said, epsilon=math.inf).model_card(front_matter=True)
    assert (
        yaml.safe_load(nothing.split("\n---\n")[0].removeprefix("---\n"))["differential_privacy"]["epsilon"] == math.inf
    )
    with refused(dpkit.ConfigurationError, "level is 7"):
        said.markdown(level=7)


def test_hugging_face_reads_the_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    said = some()
    (tmp_path / "README.md").write_text(said.model_card(front_matter=True), encoding="utf-8")
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["differential_privacy"]["epsilon"] == said.epsilon
    assert card.data.to_dict()["tags"] == ["differential-privacy", "dp-sgd"]
    assert "## Privacy guarantee" in card.text


# --- refusals ---


def test_needs_a_delta_and_a_model() -> None:
    life = attach(mlp(), noise_multiplier=1.0)
    with pytest.raises(dpkit.ConfigurationError, match="delta"):
        life.engine.statement()
    life.engine.detach()
    with pytest.raises(dpkit.NotAttachedError):
        life.engine.statement(1e-5)
