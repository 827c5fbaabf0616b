"""The page as people see it, in a real Chromium."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest

from tests.page.conftest import WORDS, Looked, PageTrainer, page_trainer
from tests.page.hostile import TEXTS
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run

ROOT = Path(__file__).parents[2]
AXE = ROOT / ".venv" / "share" / "axe.min.js"
"""Put there by scripts/test_page.sh."""
OpenPage = Callable[..., Any]
VIEWS = ("", "checkpoints", "sample", "health")


@pytest.fixture(scope="module")
def trainer() -> Iterator[PageTrainer]:
    """One without keys, with two runs that took steps and two checkpoints."""
    with page_trainer() as trainer:
        first = trainer.make_run("baseline", user_metadata={"epoch": "3"})
        trainer.train(first, 40, reward=0.5)
        trainer.train(trainer.make_run("longer"), 60, reward=0.75)
        trainer.execute(first, save_state=ops.SaveStateRequest(name="halfway"))
        trainer.execute(first, save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(name="final"))
        yield trainer


def run_named(trainer: PageTrainer, name: str) -> Run:
    runs: list[Run] = trainer.call(trainer.front.server.runs.everybodys)
    return next(run for run in runs if run.create_request.display_name == name)


def open_view(page: Any, trainer: PageTrainer, view: str) -> None:
    page.goto(f"{trainer.url}#/{view}")
    page.get_by_text("Live").wait_for()
    page.locator("main h1").first.wait_for()


def wait_text(locator: Any, text: str) -> None:
    """Returns once an element's whole text is that."""
    locator.filter(has_text=re.compile(f"^{re.escape(text)}$")).wait_for()


# ── how it looks ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_and_is_accessible(
    trainer: PageTrainer, open_page: OpenPage, shots: Path | None, scheme: str, width: int
):
    page = open_page(trainer.url, width=width, scheme=scheme)
    ids = [run_named(trainer, name).run_id for name in ("baseline", "longer")]
    for view in (*VIEWS, f"run/{ids[0]}", f"run/{','.join(ids)}"):
        open_view(page, trainer, view)
        if view.startswith("run/"):
            page.locator(".u-wrap").first.wait_for()
        elif view == "checkpoints":
            page.locator(".checkpoint").first.wait_for()
        elif view == "":
            page.get_by_role("link", name="baseline").wait_for()
        inside = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert page.evaluate(inside), f"{view} is wider than {width} px"
        if shots is not None:
            name = re.sub(r"\W+", "-", f"{view.partition('/')[0] or 'runs'}-{view.count(',')}-{scheme}-{width}")
            page.screenshot(path=shots / f"{name}.png", full_page=True)
        if AXE.exists():
            assert violations(page) == [], view


def violations(page: Any) -> list[str]:
    """Serious ones, as axe-core finds them."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not here; scripts/test_page.sh fetches it")
def test_axe_finds_what_is_wrong(trainer: PageTrainer, open_page: OpenPage):
    page = open_page(trainer.url)
    page.get_by_role("link", name="baseline").wait_for()
    page.evaluate("document.querySelector('main').append(document.createElement('input'))")
    assert violations(page) != []


def test_where_there_is_nothing_it_says_what_to_do_next(open_page: OpenPage):
    with page_trainer() as trainer:
        page = open_page(trainer.url)
        page.get_by_text("There are no runs yet.").wait_for()
        page.get_by_text("create_training_client").wait_for()
        open_view(page, trainer, "checkpoints")
        page.get_by_text("Nothing is saved yet.").wait_for()
        page.get_by_text("save_state").wait_for()
        run = trainer.make_run("fresh")
        open_view(page, trainer, f"run/{run.run_id}")
        page.get_by_text("No step has been taken yet.").wait_for()
        page.get_by_text("Nothing is under way.").wait_for()
        open_view(page, trainer, "run/run-gone")
        page.get_by_text("There is no such run.").wait_for()
        page.close()


# ── what it shows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_curve_grows_while_the_page_is_open(trainer: PageTrainer, open_page: OpenPage):
    run = trainer.make_run("growing")
    page = open_page(trainer.url)
    page.get_by_role("link", name="growing").click()
    page.get_by_text("No step has been taken yet.").wait_for()
    for value in (1, 2, 3):
        trainer.train(run, 1, reward=value)
        wait_text(page.get_by_label("Curve of reward").locator(".chart-value"), str(value))
    page.get_by_role("cell", name="optim_step").first.wait_for()
    page.locator("dd", has_text=re.compile("^3$")).wait_for()
    # The step's own numbers, and what is made of them.
    wait_text(page.get_by_label("Curve of loss per token").locator(".chart-value"), "2")
    wait_text(page.get_by_label("Curve of grad_norm:mean").locator(".chart-value"), "1.5")


def test_what_is_queued_and_what_executes_is_told(trainer: PageTrainer, open_page: OpenPage):
    run = trainer.make_run("busy")
    page = open_page(f"{trainer.url}#/run/{run.run_id}")
    page.get_by_text("Nothing is under way.").wait_for()
    trainer.call(trainer.worker.gate.clear)
    try:
        for seq_id in (1, 2):
            request = ops.ForwardBackwardRequest()
            operation = Operation.made(TrainRequest(seq_id=seq_id, forward_backward=request))
            trainer.call(run.submit, operation, lambda _: None)
        items = page.locator(".under-way li")
        items.nth(1).wait_for()
        assert "#1 forward_backward" in items.nth(0).inner_text()
        assert [item.locator(".badge").inner_text() for item in items.all()] == ["executing", "queued"]
    finally:
        trainer.call(trainer.worker.gate.set)
    page.get_by_text("Nothing is under way.").wait_for()


def test_curves_are_smoothed_scaled_zoomed_and_laid_over_one_another(trainer: PageTrainer, open_page: OpenPage):
    page = open_page(f"{trainer.url}#/run/{run_named(trainer, 'baseline').run_id}")
    chart = page.get_by_label("Curve of reward")
    chart.locator(".u-wrap").wait_for()
    page.get_by_label("Log scale").check()
    page.get_by_label("Smoothing").fill("0.9")
    page.get_by_text("0.9", exact=True).wait_for()
    show_all = page.get_by_role("button", name="Show all")
    assert not show_all.is_visible()
    over = chart.locator(".u-over").bounding_box()
    page.mouse.move(over["x"] + 20, over["y"] + 50)
    page.mouse.down()
    page.mouse.move(over["x"] + 120, over["y"] + 50, steps=5)
    page.mouse.up()
    show_all.click()
    show_all.wait_for(state="hidden")
    page.get_by_role("button", name="Last quarter").click()
    show_all.wait_for()
    page.get_by_label("Over", exact=True).select_option("time")
    page.get_by_label("Compare with another run").select_option(run_named(trainer, "longer").run_id)
    page.get_by_text("2 runs compared").wait_for()
    labels = page.get_by_label("Curve of reward").locator(".u-legend .u-label")
    labels.nth(2).wait_for()
    assert labels.all_inner_texts()[1:] == ["baseline", "longer"]
    page.get_by_role("button", name="Remove baseline").click()
    page.get_by_role("heading", name="longer").wait_for()


def test_runs_are_found_and_compared_from_the_list(trainer: PageTrainer, open_page: OpenPage):
    page = open_page(trainer.url)
    page.get_by_role("link", name="baseline").wait_for()
    page.get_by_label("Filter runs").fill("LONG")
    page.get_by_role("link", name="baseline").wait_for(state="detached")
    page.get_by_label("Compare longer").check()
    page.get_by_label("Filter runs").fill("nothing of the kind")
    page.get_by_text("No run has that").wait_for()
    page.get_by_label("Filter runs").fill("base")
    page.get_by_label("Compare baseline").check()
    page.get_by_role("button", name="Compare 2").click()
    page.get_by_text("2 runs compared").wait_for()


def test_a_sample_streams_in_the_colours_of_its_logprobs(trainer: PageTrainer, open_page: OpenPage):
    page = open_page(f"{trainer.url}#/sample")
    page.get_by_label("Prompt", exact=True).fill("Count:")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    answer = page.get_by_role("log")
    tokens = answer.locator(".token")
    for count in range(1, len(WORDS) + 1):
        trainer.worker.words.release()
        tokens.nth(count - 1).wait_for()
        assert tokens.count() == count
    page.get_by_text("4 tokens, ended by their number.").wait_for()
    assert answer.inner_text() == "Count: one two <b>three</b> four"
    # 0, -2, -4 and -6.
    assert [token.get_attribute("class") for token in tokens.all()] == ["token p0", "token p2", "token p3", "token p4"]
    assert tokens.nth(1).get_attribute("title") == "logprob -2"


def test_a_sample_can_be_stopped(trainer: PageTrainer, open_page: OpenPage):
    page = open_page(f"{trainer.url}#/sample")
    page.get_by_label("Prompt", exact=True).fill("Count:")
    page.get_by_role("button", name="Sample").click()
    trainer.worker.words.release()
    page.locator(".sampled .token").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("1 tokens, stopped.").wait_for()
    trainer.worker.words.release(3)


def test_a_checkpoint_is_deleted_after_a_question_alone(trainer: PageTrainer, open_page: OpenPage, looked: Looked):
    run = run_named(trainer, "baseline")
    for name in ("doomed", "gone"):
        trainer.execute(run, save_state=ops.SaveStateRequest(name=name))
    page = open_page(f"{trainer.url}#/checkpoints")
    path = f"gradwire://{run.run_id}/state/doomed"
    button = page.get_by_role("button", name=f"Delete {path}")
    page.get_by_text(f"gradwire checkpoints download {path}").wait_for()
    button.click()
    page.get_by_role("dialog").get_by_text("This cannot be undone.").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").wait_for(state="detached")
    assert button.is_visible()
    trainer.front.server.catalog.find(path)
    button.click()
    page.get_by_role("button", name="Delete permanently").click()
    button.wait_for(state="detached")
    gone = f"gradwire://{run.run_id}/state/gone"
    page.get_by_label(f"How long {gone} is kept").select_option("3600")
    page.get_by_text(re.compile("expires .*202")).wait_for()
    # What is refused is said, and changes nothing.
    trainer.call(trainer.front.server.catalog.delete, gone)
    page.get_by_role("button", name=f"Delete {gone}").click()
    page.get_by_role("button", name="Delete permanently").click()
    page.get_by_role("alert").get_by_text("There is no checkpoint").wait_for()
    assert [text for text in looked.errors if "404" not in text] == []
    looked.errors.clear()


def test_health_tells_of_a_worker_that_died_and_why(open_page: OpenPage):
    with page_trainer() as trainer:
        page = open_page(f"{trainer.url}#/health")
        page.get_by_text("The worker has not died").wait_for()
        wait_text(page.locator(".health .badge"), "ready")
        trainer.call(trainer.worker.die, "The worker process ended (signal SIGKILL).")
        wait_text(page.locator(".health .badge"), "not responding" if not trainer.worker.responding else "not ready")
        page.locator(".deaths").get_by_text("signal SIGKILL").wait_for()
        trainer.call(trainer.worker.become_ready)
        wait_text(page.locator(".health .badge"), "ready")
        page.get_by_role("heading", name="Who holds what").wait_for()
        page.close()


def test_health_tells_the_ranks_and_how_they_are_arranged(open_page: OpenPage):
    with page_trainer() as trainer:
        trainer.worker.counters = {"gradwire_worker_world_size": 1.0}
        page = open_page(f"{trainer.url}#/health")
        fact = page.locator(".facts-list > div", has_text="Ranks").locator("dd")
        wait_text(fact, "1")
        mesh = {"world_size": 8.0, "local_world_size": 4.0, "nnodes": 2.0, "fsdp_size": 4.0}
        trainer.worker.counters = {f"gradwire_worker_{name}": value for name, value in mesh.items()}
        wait_text(fact, "8 on 2 machines with parameters in 4 parts")
        trainer.worker.counters |= {"gradwire_worker_dp_replicate_size": 2.0}
        wait_text(fact, "8 on 2 machines with parameters in 4 parts 2 times over")
        trainer.worker.counters |= {"gradwire_worker_tp_size": 2.0, "gradwire_worker_fsdp_size": 2.0}
        wait_text(fact, "8 on 2 machines 2 to a layer with parameters in 2 parts 2 times over")
        page.close()


def test_a_page_catches_up_after_a_break(trainer: PageTrainer, open_page: OpenPage, looked: Looked):
    run = trainer.make_run("slept")
    trainer.train(run, 1, reward=1)
    page = open_page(f"{trainer.url}#/run/{run.run_id}")
    value = page.get_by_label("Curve of reward").locator(".chart-value")
    wait_text(value, "1")
    trainer.call(trainer.page.feed.disconnect_all)
    page.context.set_offline(True)
    page.get_by_text("Connecting…").wait_for()
    trainer.train(run, 5, reward=6)
    page.context.set_offline(False)
    wait_text(value, "6")
    page.get_by_text("Live").wait_for()
    assert [text for text in looked.errors if "Failed to load resource" not in text] == []
    looked.errors.clear()


# ── who may look ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_key_is_refused_and_a_right_one_opens(open_page: OpenPage, looked: Looked):
    with page_trainer(api_keys=("alice a-key", "ops o-key admin")) as trainer:
        page = open_page(trainer.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("This is not a key of this trainer.").wait_for()
        page.get_by_label("API key").fill("o-key")
        page.keyboard.press("Enter")
        page.get_by_text("There are no runs yet.").wait_for()
        page.get_by_text("ops (admin)").wait_for()
        # Scripts cannot read the cookie, nor is the key anywhere they can.
        assert page.evaluate("document.cookie") == ""
        assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
        [cookie] = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], "o-key" in cookie["value"]) == (True, "Strict", False)
        page.reload()
        page.get_by_text("There are no runs yet.").wait_for()
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("API key").wait_for()
        page.close()
        assert [text for text in looked.errors if "401" not in text] == []
        looked.errors.clear()


# ── keyboard ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_can_be_done_with_the_keyboard_alone(trainer: PageTrainer, open_page: OpenPage):
    page = open_page(trainer.url)
    page.get_by_role("link", name="baseline").wait_for()
    press = page.keyboard.press

    def tab_to(name: str, *, most: int = 80) -> None:
        for _ in range(most):
            press("Tab")
            focused = page.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent "
                "|| document.activeElement.id)"
            )
            if focused == name:
                # A person sees where they are.
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return
        raise AssertionError(f"{name} was not reached")

    tab_to("Skip to content")
    press("Enter")
    tab_to("Filter runs")
    tab_to("Compare longer")
    press("Space")
    tab_to("baseline")
    press("Enter")
    page.locator(".u-wrap").first.wait_for()
    tab_to("smoothing")
    press("ArrowRight")
    page.get_by_text("0.02", exact=True).wait_for()
    tab_to("log")
    press("Space")
    tab_to("Last quarter")
    press("Enter")
    page.get_by_role("button", name="Show all").wait_for()
    open_view(page, trainer, "checkpoints")
    page.locator(".checkpoint").first.wait_for()
    run_id = run_named(trainer, "baseline").run_id
    tab_to(f"Delete gradwire://{run_id}/sampler_weights/final")
    press("Enter")
    page.get_by_role("dialog").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    assert page.evaluate("document.activeElement.textContent") == "Delete…"


# ── what others wrote ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_hundred_hostile_texts_are_shown_as_text(open_page: OpenPage):
    with page_trainer() as trainer:
        trainer.make_runs(TEXTS)
        loud = trainer.make_run("loud", user_metadata={text[:60]: text for text in TEXTS[:20] if "\0" not in text})
        trainer.train(loud, 2, **dict.fromkeys(TEXTS, 1.0))
        trainer.worker.failures[loud.run_id, loud.next_seq_id] = error("NON_FINITE", TEXTS[0])
        trainer.execute(loud, forward_backward=ops.ForwardBackwardRequest())
        metadata = {"note": TEXTS[0], "<img src=x onerror=alert(1)>": TEXTS[2]}
        trainer.execute(loud, save_state=ops.SaveStateRequest(name="loud", user_metadata=metadata))
        trainer.call(trainer.worker.die, TEXTS[4])
        trainer.call(trainer.worker.become_ready)
        page = open_page(trainer.url)
        page.get_by_role("link", name="loud").wait_for()
        elements = "Array.from(document.querySelectorAll(%r), each => each.textContent)"
        assert set(page.evaluate(elements % "tbody th a")) >= {text for text in TEXTS if text}
        open_view(page, trainer, f"run/{loud.run_id}")
        page.locator(".chart").nth(len(TEXTS) - 1).wait_for(state="attached")
        assert set(page.evaluate(elements % ".chart-name")) >= set(TEXTS)
        open_view(page, trainer, "checkpoints")
        page.get_by_text(TEXTS[2]).wait_for()
        open_view(page, trainer, "health")
        page.locator(".deaths").get_by_text(TEXTS[4]).wait_for()
        open_view(page, trainer, "sample")
        trainer.worker.words.release(len(WORDS))
        page.get_by_label("Prompt", exact=True).fill(TEXTS[0])
        page.get_by_label("Prompt", exact=True).press("Control+Enter")
        page.get_by_text("4 tokens, ended").wait_for()
        assert TEXTS[0] in page.get_by_role("log").inner_text()
        assert page.evaluate("[window.taken, document.querySelectorAll('script').length, document.images.length]") == [
            None,
            1,
            1,
        ]
        page.close()
