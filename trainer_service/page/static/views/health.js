// State of the trainer and its worker, and who holds what.

import { call } from "../api.js";
import { h, setText } from "../dom.js";
import * as format from "../format.js";

const HOLDERS_MS = 10_000;
const OF_BYTES = /_bytes$/;

/** Of the worker's device, rank 0's. */
function memory({ gradwire_worker_memory_bytes: used, gradwire_worker_memory_limit_bytes: limit }) {
    return used ? `${format.size(used)}${limit ? ` of ${format.size(limit)}` : ""}` : "";
}

/** The worker's processes and how they are arranged, as far as it tells. */
function ranks(counters) {
    const told = (name) => counters[`gradwire_worker_${name}`];
    const parts = [format.number(told("world_size"))];
    if (told("nnodes") > 1) parts.push(`on ${format.number(told("nnodes"))} machines`);
    if (told("tp_size") > 1) parts.push(`${format.number(told("tp_size"))} to a layer`);
    if (told("fsdp_size") > 1) parts.push(`with parameters in ${format.number(told("fsdp_size"))} parts`);
    if (told("ep_size") > 1) parts.push(`experts on ${format.number(told("ep_size"))}`);
    if (told("dp_replicate_size") > 1) parts.push(`${format.number(told("dp_replicate_size"))} times over`);
    return parts.join(" ");
}

export class HealthView {
    title = "Health";

    constructor(main, { live, me }) {
        this.live = live;
        this.state = h("p", { class: "health", role: "status" });
        this.facts = h("dl", { class: "facts-list" });
        this.deaths = h("div");
        this.counters = h("tbody");
        main.append(
            h("h1", {}, "Health"),
            h("section", { class: "card" }, h("h2", {}, "Worker"), this.state, this.facts),
            h("section", { class: "card" }, h("h2", {}, "Restarts"), this.deaths),
        );
        if (me.admin) {
            this.holders = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Who holds what" });
            main.append(h("section", { class: "card" }, h("h2", {}, "Who holds what"), this.holders));
            this.#hold();
            this.timer = setInterval(() => !document.hidden && this.#hold(), HOLDERS_MS);
        }
        main.append(
            h(
                "details",
                { class: "more" },
                h("summary", {}, "What the worker counts"),
                h(
                    "div",
                    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Counters" },
                    h(
                        "table",
                        {},
                        h(
                            "thead",
                            {},
                            h("tr", {}, h("th", { scope: "col" }, "Counter"), h("th", { scope: "col" }, "Value")),
                        ),
                        this.counters,
                    ),
                ),
            ),
        );
        this.onState();
    }

    close() {
        clearInterval(this.timer);
    }

    onState() {
        const health = this.live.health;
        if (!health) {
            setText(this.state, "Loading…");
            return;
        }
        const word = health.ready ? "ready" : health.responding ? "not ready" : "not responding";
        this.state.replaceChildren(
            h("span", { class: `badge ${health.ready ? "good" : "bad"}` }, word),
            " ",
            health.ready ? "" : health.status,
        );
        const { model, counters } = health;
        const facts = [
            ...(model
                ? [
                      ["Model", `${model.base_model} (${model.architecture})`],
                      ["Parameters", `${format.number(model.num_parameters)}, ${model.dtype}`],
                      ["Device", model.device],
                      ["Context", `${format.number(model.max_context_length)} tokens`],
                      ["Batching", model.batching],
                      ["Sampling", model.sampling],
                  ]
                : []),
            ["Ranks", ranks(counters)],
            ["Memory", memory(counters)],
            ["Runs on the worker", format.number(counters.gradwire_worker_runs ?? null)],
            [
                "Graphs held",
                counters.gradwire_worker_held_graphs === undefined
                    ? ""
                    : `${counters.gradwire_worker_held_graphs} (${format.size(counters.gradwire_worker_held_graph_bytes ?? 0)})`,
            ],
            ["Operations under way", format.number(health.operations)],
            ["Samples under way", format.number(health.sample_requests)],
            ["Pages open", format.number(health.pages)],
            ["Restarts", format.number(counters.gradwire_worker_restarts_total ?? health.deaths.length)],
            ["Trainer's memory", format.size(health.memory_bytes)],
            ["Trainer", `gradwire ${health.version}, up ${format.duration(Date.now() / 1000 - health.started_s)}`],
        ].filter(([, value]) => value);
        this.facts.replaceChildren(
            ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
        );
        const key = JSON.stringify(health.deaths);
        if (key !== this.deathsKey) {
            this.deathsKey = key;
            this.deaths.replaceChildren(
                health.deaths.length
                    ? h(
                          "ul",
                          { class: "deaths" },
                          health.deaths.map(({ time_s, why }) =>
                              h(
                                  "li",
                                  {},
                                  h("time", {}, format.date(time_s)),
                                  h("p", {}, why || "Only admins see why."),
                              ),
                          ),
                      )
                    : h("p", { class: "muted" }, "The worker has not died since the trainer started."),
            );
        }
        this.counters.replaceChildren(
            ...Object.entries(counters)
                .sort()
                .map(([name, value]) =>
                    h(
                        "tr",
                        {},
                        h("th", { scope: "row" }, h("code", {}, name)),
                        h("td", { class: "number" }, OF_BYTES.test(name) ? format.size(value) : format.number(value)),
                    ),
                ),
        );
    }

    async #hold() {
        try {
            const { holders } = await call("/api/holders");
            const rows = holders.map((each) =>
                h(
                    "tr",
                    {},
                    h("th", { scope: "row" }, each.owner || "everybody"),
                    ...[each.runs, each.operations].map((value) => h("td", { class: "number" }, format.number(value))),
                    h("td", { class: "number" }, format.size(each.journal_bytes)),
                    h("td", { class: "number" }, format.number(each.checkpoints)),
                    h("td", { class: "number" }, format.size(each.checkpoint_bytes)),
                ),
            );
            const names = ["Owner", "Runs", "Under way", "Journals", "Checkpoints", "Their size"];
            this.holders.replaceChildren(
                holders.length
                    ? h(
                          "table",
                          {},
                          h(
                              "thead",
                              {},
                              h(
                                  "tr",
                                  {},
                                  names.map((name) => h("th", { scope: "col" }, name)),
                              ),
                          ),
                          h("tbody", {}, rows),
                      )
                    : h("p", { class: "muted" }, "Nobody holds anything."),
            );
        } catch (error) {
            this.holders.replaceChildren(h("p", { class: "problem" }, error.message));
        }
    }
}
