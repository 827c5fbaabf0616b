// One run, or several compared: curves and operations.

import { Chart, colour } from "../chart.js";
import { command, empty, h, reconcile, setText } from "../dom.js";
import * as format from "../format.js";
import { stateOf } from "./runs.js";

const FIRST = ["loss:sum", "loss per token", "grad_norm:mean", "learning_rate", "tokens per second"];
// What the trainer measures, rather than what training is about.
const LAST = /^(queue_ms|execute_ms|transfer_ms|memory_bytes|num_|forward_passes)/;
const REDRAW_MS = 250;

export class RunView {
    title = "Run";

    constructor(main, { live, navigate }, argument) {
        this.live = live;
        this.runIds = [...new Set(argument.split(",").filter(Boolean))];
        this.navigate = navigate;
        this.charts = new Map();
        this.settings = { smoothing: 0, log: false, x: "step", range: null, onZoom: (range) => this.#zoom(range) };
        this.heading = h("h1", {}, "Run");
        this.facts = h("div", { class: "facts" });
        this.chips = h("ul", { class: "chips", "aria-label": "Runs shown" });
        this.add = h("select", { "aria-label": "Compare with another run", onchange: () => this.#add() });
        const smoothing = h("input", {
            type: "range",
            min: "0",
            max: "0.98",
            step: "0.02",
            value: "0",
            id: "smoothing",
        });
        smoothing.addEventListener("input", () => {
            this.settings.smoothing = Number(smoothing.value);
            setText(this.smoothed, Number(smoothing.value) ? smoothing.value : "off");
            this.#draw();
        });
        this.smoothed = h("output", { for: "smoothing" }, "off");
        const log = h("input", { type: "checkbox", id: "log", onchange: () => this.#set("log", log.checked) });
        const x = h(
            "select",
            { id: "x-axis", onchange: () => this.#set("x", x.value) },
            h("option", { value: "step" }, "steps"),
            h("option", { value: "time" }, "time"),
        );
        this.unzoom = h("button", { type: "button", hidden: true, onclick: () => this.#zoom(null) }, "Show all");
        const zoomIn = h("button", { type: "button", onclick: () => this.#latest() }, "Last quarter");
        this.first = h("div", { class: "charts" });
        this.rest = h("div", { class: "charts" });
        this.more = h("details", { class: "more" }, h("summary", {}, "Counts, times and memory"), this.rest);
        this.more.addEventListener("toggle", () => this.#draw());
        this.none = h("div");
        this.note = h("p", { class: "muted" });
        this.now = h("ul", { class: "under-way" });
        this.nowNote = h("p", { class: "muted" });
        this.recent = h("tbody");
        const operations = h(
            "section",
            { class: "card operations" },
            h("h2", {}, "Operations"),
            this.nowNote,
            this.now,
            h(
                "div",
                { class: "scroll", tabindex: "0", role: "region", "aria-label": "Last operations" },
                h(
                    "table",
                    {},
                    h(
                        "thead",
                        {},
                        h(
                            "tr",
                            {},
                            ["#", "Operation", "Step", "Queued", "Executed", "Moved", "Parts"].map((name) =>
                                h("th", { scope: "col" }, name),
                            ),
                        ),
                    ),
                    this.recent,
                ),
            ),
            h(
                "p",
                { class: "muted legend-parts" },
                h("span", { class: "part queue" }),
                "waited for its turn ",
                h("span", { class: "part execute" }),
                "ran on the device ",
                h("span", { class: "part transfer" }),
                "moved between trainer and worker, and to the journal",
            ),
        );
        this.operations = operations;
        this.content = h(
            "div",
            { class: "content" },
            h(
                "div",
                { class: "controls card" },
                h("span", { class: "field" }, h("label", { for: "smoothing" }, "Smoothing"), smoothing, this.smoothed),
                h("span", { class: "field" }, log, h("label", { for: "log" }, "Log scale")),
                h("span", { class: "field" }, h("label", { for: "x-axis" }, "Over"), x),
                h("span", { class: "field" }, zoomIn, this.unzoom),
                this.add,
            ),
            this.note,
            this.first,
            this.none,
            this.more,
            operations,
        );
        this.missing = h("div");
        main.append(h("div", { class: "row" }, this.heading), this.facts, this.chips, this.missing, this.content);
        this.onState();
        this.#draw();
        for (const id of this.runIds) this.onOperations(id);
    }

    close() {
        clearTimeout(this.timer);
        for (const chart of this.charts.values()) chart.close();
    }

    onState() {
        const runs = this.runIds.map((id) => this.live.runs.get(id));
        const single = this.runIds.length === 1 ? runs[0] : null;
        setText(
            this.heading,
            single
                ? single.name || single.run_id
                : this.runIds.length > 1
                  ? `${this.runIds.length} runs compared`
                  : this.runIds[0] || "No run",
        );
        document.title = `${this.heading.textContent} · Gradwire`;
        this.content.hidden = this.live.known && runs.every((run) => !run);
        if (this.content.hidden && !this.missing.firstChild) {
            this.missing.append(
                empty(
                    "There is no such run.",
                    "It was deleted, or belongs to another key.",
                    h("a", { href: "#/" }, "See all runs"),
                ),
            );
        } else if (!this.content.hidden) this.missing.replaceChildren();
        if (single) this.#facts(single);
        else this.facts.replaceChildren();
        reconcile(
            this.chips,
            this.runIds.length > 1 ? this.runIds : [],
            (id) => id,
            (id) => this.#chip(id),
            () => null,
        );
        this.#others();
        this.operations.hidden = this.runIds.length !== 1;
    }

    onPoints() {
        if (this.timer) return;
        // Many steps may come at once; a screen is drawn a few times a second.
        this.timer = setTimeout(() => {
            this.timer = 0;
            this.#draw();
        }, REDRAW_MS);
    }

    onOperations(runId) {
        const told = this.live.operations.get(runId);
        if (!told || runId !== this.runIds[0]) return;
        setText(
            this.nowNote,
            told.under_way.length ? "" : "Nothing is under way. Operations appear here as a client sends them.",
        );
        reconcile(
            this.now,
            told.under_way,
            (each) => each.seq_id,
            (each) =>
                h(
                    "li",
                    {},
                    h("code", {}, `#${each.seq_id} ${each.kind}`),
                    h("span", { class: "badge" }),
                    h("span", { class: "muted" }),
                ),
            (item, each) => {
                const [, badge, waited] = item.children;
                badge.className = `badge ${each.executing ? "good" : ""}`;
                setText(badge, each.executing ? "executing" : "queued");
                setText(waited, `for ${format.milliseconds(each.waited_ms)}`);
            },
        );
        const most = Math.max(
            1,
            ...told.recent.map((each) => (each.queue ?? 0) + (each.execute ?? 0) + (each.transfer ?? 0)),
        );
        reconcile(
            this.recent,
            told.recent,
            (each) => each.seq_id,
            (each) => this.#operation(each),
            (row, each) => {
                for (const part of row.querySelectorAll(".part"))
                    part.style.width = `${(100 * (each[part.dataset.part] ?? 0)) / most}%`;
            },
        );
    }

    #operation(each) {
        const parts = ["queue", "execute", "transfer"];
        return h(
            "tr",
            { class: each.reason ? "failed" : null },
            h("td", { class: "number" }, String(each.seq_id)),
            h("td", {}, each.kind, each.reason ? h("span", { class: "badge bad" }, each.reason) : null),
            h("td", { class: "number" }, String(each.step)),
            ...parts.map((part) => h("td", { class: "number" }, format.milliseconds(each[part]))),
            h(
                "td",
                { class: "bar" },
                h(
                    "div",
                    {},
                    parts.map((part) => h("span", { class: `part ${part}`, "data-part": part })),
                ),
            ),
        );
    }

    #facts(run) {
        const state = stateOf(run);
        const facts = [
            ["State", h("span", { class: `badge ${state.kind}` }, state.name)],
            ["Step", format.number(run.step)],
            ["Rate", format.rate(run.rate)],
            ["Trains", run.lora_rank ? `LoRA, rank ${run.lora_rank}` : "all parameters"],
            ["Id", run.run_id],
            ...(run.owner !== undefined && run.owner !== "" ? [["Owner", run.owner]] : []),
            ...(run.forked_from ? [["Forked from", run.forked_from]] : []),
            ["Created", format.date(run.created_s)],
            ...Object.entries(run.metadata),
            ...(run.why ? [["Lost", run.why]] : []),
        ];
        const key = JSON.stringify([run, state]);
        if (this.factsKey === key) return;
        this.factsKey = key;
        this.facts.replaceChildren(
            h(
                "dl",
                {},
                facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
            ),
            command(`gradwire metrics ${run.run_id} --csv`),
        );
    }

    #chip(id) {
        const run = this.live.runs.get(id);
        const mark = h("span", { class: "mark" });
        mark.style.background = colour(this.runIds.indexOf(id));
        const remove = () =>
            this.navigate(`#/run/${encodeURIComponent(this.runIds.filter((other) => other !== id).join(","))}`);
        return h(
            "li",
            {},
            mark,
            h("a", { href: `#/run/${encodeURIComponent(id)}` }, run?.name || id),
            h(
                "button",
                { type: "button", class: "small", "aria-label": `Remove ${run?.name || id}`, onclick: remove },
                "×",
            ),
        );
    }

    #others() {
        const others = [...this.live.runs.values()].filter((run) => !this.runIds.includes(run.run_id));
        const key = others.map((run) => run.run_id).join();
        if (this.othersKey === key) return;
        this.othersKey = key;
        this.add.hidden = others.length === 0;
        this.add.replaceChildren(
            h("option", { value: "" }, "Compare with…"),
            ...others.map((run) =>
                h("option", { value: run.run_id }, run.name ? `${run.name} (${run.run_id})` : run.run_id),
            ),
        );
    }

    #add() {
        if (this.add.value) this.navigate(`#/run/${encodeURIComponent([...this.runIds, this.add.value].join(","))}`);
    }

    #set(name, value) {
        this.settings[name] = value;
        if (name === "x") this.settings.range = null;
        this.#draw();
    }

    #zoom(range) {
        this.settings.range = range;
        this.unzoom.hidden = range === null;
        this.#draw();
    }

    #latest() {
        const xs = this.runIds.flatMap((id) => this.#xs(this.live.curves.get(id)));
        if (xs.length < 2) return;
        const max = xs.reduce((a, b) => Math.max(a, b));
        const min = xs.reduce((a, b) => Math.min(a, b));
        this.#zoom({ min: max - (max - min) / 4, max });
    }

    #xs(curve) {
        return curve ? (this.settings.x === "time" ? curve.times : curve.steps) : [];
    }

    #draw() {
        const curves = this.runIds
            .map((id, place) => ({ id, place, curve: this.live.curves.get(id) }))
            .filter(({ curve }) => curve?.steps.length);
        const names = order(new Set(curves.flatMap(({ curve }) => [...curve.series.keys(), ...derivedNames(curve)])));
        const shown = new Set();
        for (const name of names) {
            const place = LAST.test(name) ? this.rest : this.first;
            if (place === this.rest && !this.more.open) continue;
            let chart = this.charts.get(name);
            if (!chart) {
                chart = new Chart(name, this.settings);
                this.charts.set(name, chart);
            }
            place.append(chart.element);
            shown.add(name);
            const tables = curves.map(({ id, place, curve }) => {
                const run = this.live.runs.get(id);
                return { label: run?.name || id, place, ...table(this.#xs(curve), seriesOf(curve, name)) };
            });
            chart.show(tables.filter(({ xs }) => xs.length));
        }
        for (const [name, chart] of this.charts) {
            if (!shown.has(name) && !LAST.test(name)) {
                chart.close();
                chart.element.remove();
                this.charts.delete(name);
            }
        }
        this.more.hidden = !names.some((name) => LAST.test(name));
        const every = Math.max(1, ...curves.map(({ curve }) => curve.every ?? 1));
        const leftOut = Math.max(0, ...curves.map(({ curve }) => curve.leftOut ?? 0));
        setText(
            this.note,
            [
                every > 1 ? `Only every ${every}th of the earlier steps is drawn; gradwire metrics prints all.` : "",
                leftOut ? `${leftOut} metrics beyond 256 are left out.` : "",
            ]
                .join(" ")
                .trim(),
        );
        if (curves.length === 0 && !this.none.firstChild) {
            this.none.append(
                empty(
                    "No step has been taken yet.",
                    "Curves begin with the first optim_step:",
                    h(
                        "pre",
                        {},
                        "client.forward_backward(batch)\nclient.optim_step(gradwire.AdamParams(learning_rate=1e-4))",
                    ),
                ),
            );
        } else if (curves.length) this.none.replaceChildren();
    }
}

/** Points with a value, ascending: after loading a state a run reaches a step again, and the last time counts. */
function table(xs, values) {
    const found = new Map();
    values.forEach((value, place) => {
        if (value !== null && value !== undefined) found.set(xs[place], value);
    });
    const sorted = [...found].sort((a, b) => a[0] - b[0]);
    return { xs: sorted.map(([x]) => x), values: sorted.map(([, value]) => value) };
}

function derivedNames(curve) {
    const has = (name) => curve.series.has(name);
    return [
        ...(has("loss:sum") && has("num_loss_tokens:sum") ? ["loss per token"] : []),
        ...(has("num_tokens:sum") && curve.steps.length > 1 ? ["tokens per second"] : []),
    ];
}

function seriesOf(curve, name) {
    const known = curve.series.get(name);
    if (known) return known;
    if (name === "loss per token") {
        const tokens = curve.series.get("num_loss_tokens:sum") ?? [];
        return (curve.series.get("loss:sum") ?? []).map((loss, place) =>
            loss !== null && tokens[place] ? loss / tokens[place] : null,
        );
    }
    if (name === "tokens per second") {
        const tokens = curve.series.get("num_tokens:sum") ?? [];
        return tokens.map((count, place) => {
            const seconds = place ? curve.times[place] - curve.times[place - 1] : 0;
            return count !== null && seconds > 0 ? count / seconds : null;
        });
    }
    return [];
}

function order(names) {
    const first = FIRST.filter((name) => names.has(name));
    return [...first, ...[...names].filter((name) => !FIRST.includes(name)).sort()];
}
