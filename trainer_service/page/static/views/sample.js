// A prompt goes in; tokens come out as they are sampled, coloured by logprob.

import { call, request } from "../api.js";
import { h, setText } from "../dom.js";
import { number } from "../format.js";

// Natural logarithms: sure, likely, so-so, unlikely, a surprise.
const STEPS = [-0.1, -0.7, -2, -4];

export class SampleView {
    title = "Sample";

    constructor(main, { live }, argument) {
        this.live = live;
        this.wanted = argument;
        this.source = h("select", { id: "source" });
        const prompt = h("textarea", {
            id: "prompt",
            rows: "5",
            required: true,
            placeholder: "The capital of France is",
        });
        const tokens = h("input", { type: "number", id: "max-tokens", min: "1", max: "4096", value: "64" });
        const temperature = h("input", {
            type: "number",
            id: "temperature",
            min: "0",
            max: "10",
            step: "0.1",
            value: "0.8",
        });
        this.button = h("button", { type: "submit", class: "primary" }, "Sample");
        this.stop = h("button", { type: "button", hidden: true, onclick: () => this.reader?.cancel() }, "Stop");
        this.problem = h("p", { class: "problem", role: "alert" });
        this.output = h("div", { class: "sampled", role: "log", "aria-label": "Sampled text", tabindex: "0" });
        this.ended = h("p", { class: "muted", role: "status" });
        const form = h(
            "form",
            { class: "card sample" },
            h(
                "div",
                { class: "fields" },
                h("div", { class: "stack wide" }, h("label", { for: "source" }, "From"), this.source),
                h("div", { class: "stack" }, h("label", { for: "max-tokens" }, "Tokens"), tokens),
                h("div", { class: "stack" }, h("label", { for: "temperature" }, "Temperature"), temperature),
            ),
            h("label", { for: "prompt" }, "Prompt"),
            prompt,
            h("div", { class: "row" }, this.button, this.stop, h("span", { class: "muted" }, "Ctrl+Enter samples")),
            this.problem,
        );
        form.addEventListener("submit", (event) => {
            event.preventDefault();
            this.#sample({
                source: this.source.value,
                prompt: prompt.value,
                max_tokens: Number(tokens.value),
                temperature: Number(temperature.value),
            });
        });
        prompt.addEventListener("keydown", (event) => {
            if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
        });
        const legend = h(
            "p",
            { class: "muted legend-parts" },
            "Probability: ",
            ["90 % and more", "50 %", "14 %", "2 %", "less"].map((text, place) => [
                h("span", { class: `token p${place}` }, text),
                " ",
            ]),
        );
        this.empty = h("span", { class: "muted" }, "Sampled text appears here.");
        this.output.append(this.empty);
        main.append(
            h("h1", {}, "Sample"),
            form,
            h("section", { class: "card" }, h("h2", {}, "Answer"), legend, this.output, this.ended),
        );
        this.checkpoints = [];
        this.onState();
        call("/api/checkpoints").then(
            ({ checkpoints }) => {
                this.checkpoints = checkpoints.filter(({ kind }) => kind !== "state");
                this.onState();
            },
            (error) => setText(this.problem, error.message),
        );
    }

    close() {
        this.reader?.cancel();
    }

    onState() {
        const runs = [...this.live.runs.values()].filter(({ state }) => state !== "lost");
        const key = JSON.stringify([
            runs.map(({ run_id, attached }) => [run_id, attached]),
            this.checkpoints.map(({ path }) => path),
        ]);
        if (key === this.key) return;
        this.key = key;
        const chosen = this.source.value || this.wanted || "base";
        const option = (value, text, disabled) => h("option", { value, disabled }, text);
        this.source.replaceChildren(
            option("base", "the base model"),
            ...(runs.length
                ? [
                      h(
                          "optgroup",
                          { label: "Runs as they are now" },
                          runs.map((run) =>
                              option(
                                  run.run_id,
                                  `${run.name || run.run_id}${run.attached ? " (a client trains it; take a checkpoint)" : ""}`,
                                  run.attached,
                              ),
                          ),
                      ),
                  ]
                : []),
            ...(this.checkpoints.length
                ? [
                      h(
                          "optgroup",
                          { label: "Checkpoints" },
                          this.checkpoints.map(({ path }) => option(path, path)),
                      ),
                  ]
                : []),
        );
        if ([...this.source.options].some(({ value }) => value === chosen)) this.source.value = chosen;
    }

    async #sample(asked) {
        this.reader?.cancel();
        setText(this.problem, "");
        setText(this.ended, "");
        this.output.replaceChildren(h("span", { class: "prompt" }, asked.prompt));
        this.button.disabled = true;
        this.stop.hidden = false;
        let count = 0;
        try {
            const response = await request("/api/sample", asked);
            const reader = (this.reader = response.body.pipeThrough(new TextDecoderStream()).getReader());
            let rest = "";
            for (;;) {
                const { value, done } = await reader.read();
                if (done) break;
                const lines = (rest + value).split("\n");
                rest = lines.pop();
                for (const line of lines) {
                    const told = JSON.parse(line);
                    if (told.error) throw new Error(told.error.message);
                    if (told.stop_reason)
                        setText(
                            this.ended,
                            `${count} tokens, ended by ${told.stop_reason === "length" ? "their number" : "a stop token"}.`,
                        );
                    else count += this.#tokens(told);
                }
            }
            if (!this.ended.textContent) setText(this.ended, `${count} tokens, stopped.`);
        } catch (error) {
            setText(this.problem, error.message);
        } finally {
            this.button.disabled = false;
            this.stop.hidden = true;
            this.reader = null;
        }
    }

    #tokens({ text, logprobs }) {
        const known = logprobs.filter((logprob) => logprob !== null);
        const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : -Infinity;
        const place = STEPS.findIndex((step) => mean >= step);
        const title = `logprob ${logprobs.map((logprob) => (logprob === null ? "-inf" : number(logprob))).join(", ")}`;
        this.output.append(h("span", { class: `token p${place < 0 ? STEPS.length : place}`, title }, text));
        return logprobs.length;
    }
}
