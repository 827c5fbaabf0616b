// All runs that the user may see.

import { empty, h, reconcile, setText } from "../dom.js";
import * as format from "../format.js";

export class RunsView {
    title = "Runs";

    constructor(main, { live, me, navigate }) {
        this.live = live;
        this.admin = me.admin && me.key_required;
        this.chosen = new Set();
        this.filter = h("input", {
            type: "search",
            placeholder: "Name, id, owner…",
            "aria-label": "Filter runs",
            oninput: () => this.onState(),
        });
        this.compare = h(
            "button",
            {
                type: "button",
                class: "primary",
                disabled: true,
                onclick: () => navigate(`#/run/${encodeURIComponent([...this.chosen].join(","))}`),
            },
            "Compare",
        );
        const columns = ["", "Run", "State", "Step", "Rate", "Under way", ...(this.admin ? ["Owner"] : []), "Created"];
        this.body = h("tbody");
        this.table = h(
            "table",
            { class: "cards" },
            h(
                "thead",
                {},
                h(
                    "tr",
                    {},
                    columns.map((name) =>
                        h("th", { scope: "col" }, name || h("span", { class: "visually-hidden" }, "Compare")),
                    ),
                ),
            ),
            this.body,
        );
        this.summary = h("p", { class: "muted", role: "status" });
        this.empty = h("div");
        main.append(
            h("div", { class: "row" }, h("h1", {}, "Runs"), h("span", { class: "spring" }), this.filter, this.compare),
            this.summary,
            this.table,
            this.empty,
        );
        this.onState();
    }

    onState() {
        if (!this.live.known) {
            setText(this.summary, "Loading…");
            this.table.hidden = true;
            return;
        }
        const runs = [...this.live.runs.values()].sort((a, b) => b.created_s - a.created_s);
        for (const id of this.chosen) if (!this.live.runs.has(id)) this.chosen.delete(id);
        const words = this.filter.value.toLowerCase();
        const shown = runs.filter((run) =>
            `${run.run_id} ${run.name} ${run.owner ?? ""}`.toLowerCase().includes(words),
        );
        reconcile(
            this.body,
            shown,
            (run) => run.run_id,
            (run) => this.#row(run),
            (row, run) => this.#update(row, run),
        );
        this.table.hidden = shown.length === 0;
        const training = runs.filter((run) => run.unanswered > 0).length;
        setText(
            this.summary,
            runs.length
                ? `${runs.length} ${runs.length === 1 ? "run" : "runs"}, ${training} with operations under way`
                : "",
        );
        this.filter.hidden = this.compare.hidden = runs.length === 0;
        this.#chosen();
        if (this.emptyFor === `${runs.length === 0}/${shown.length === 0}`) return;
        this.emptyFor = `${runs.length === 0}/${shown.length === 0}`;
        this.empty.replaceChildren();
        if (runs.length === 0) {
            this.empty.append(
                empty(
                    "There are no runs yet.",
                    h("span", {}, "Create one from Python:"),
                    h(
                        "pre",
                        {},
                        'import gradwire\nservice = gradwire.ServiceClient("http://<this host>:7777")\nclient = service.create_training_client()',
                    ),
                    "It appears here as soon as it is created.",
                ),
            );
        } else if (shown.length === 0) {
            this.empty.append(empty("No run has that in its name, id or owner.", "Clear the filter to see all."));
        }
    }

    #row(run) {
        const choose = h("input", { type: "checkbox", "aria-label": `Compare ${run.name || run.run_id}` });
        choose.addEventListener("change", () => {
            if (choose.checked) this.chosen.add(run.run_id);
            else this.chosen.delete(run.run_id);
            this.#chosen();
        });
        const cells = Object.fromEntries(
            ["state", "step", "rate", "under", "owner", "created"].map((name) => [name, h("td")]),
        );
        const labels = {
            state: "State",
            step: "Step",
            rate: "Rate",
            under: "Under way",
            owner: "Owner",
            created: "Created",
        };
        for (const [name, cell] of Object.entries(cells)) cell.setAttribute("data-label", labels[name]);
        for (const name of ["step", "rate", "under"]) cells[name].className = "number";
        const link = h("a", { href: `#/run/${encodeURIComponent(run.run_id)}` }, run.name || run.run_id);
        const row = h(
            "tr",
            {},
            h("td", { class: "choose" }, choose),
            h("th", { scope: "row" }, link, h("span", { class: "sub" }, run.name ? run.run_id : "")),
            cells.state,
            cells.step,
            cells.rate,
            cells.under,
            this.admin ? cells.owner : null,
            cells.created,
        );
        row.cells_ = cells;
        return row;
    }

    #update(row, run) {
        const cells = row.cells_;
        const state = stateOf(run);
        if (cells.state.dataset.state !== state.name) {
            cells.state.dataset.state = state.name;
            cells.state.replaceChildren(
                h("span", { class: `badge ${state.kind}`, title: run.why ?? null }, state.name),
            );
        }
        setText(cells.step, format.number(run.step));
        setText(cells.rate, format.rate(run.rate));
        setText(cells.under, run.unanswered);
        setText(cells.owner, run.owner || "–");
        setText(cells.created, format.ago(run.created_s));
        cells.created.title = format.date(run.created_s);
    }

    #chosen() {
        this.compare.disabled = this.chosen.size < 2;
        setText(this.compare, this.chosen.size < 2 ? "Compare" : `Compare ${this.chosen.size}`);
    }
}

/** A run's state in a word. */
export function stateOf(run) {
    if (run.state === "lost") return { name: "lost", kind: "bad" };
    if (run.unanswered > 0) return { name: "working", kind: "good" };
    if (run.attached) return { name: "attached", kind: "good" };
    return run.on_worker ? { name: "idle", kind: "" } : { name: "unloaded", kind: "" };
}
