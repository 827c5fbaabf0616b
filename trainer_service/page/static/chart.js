// One metric's curves, of one run or several.

import uPlot from "./vendor/uPlot.esm.js";
import { h, setText } from "./dom.js";
import { number, size, tick } from "./format.js";

// Distinguishable with colour blindness too, on light and dark backgrounds.
const COLOURS = {
    light: ["#0f766e", "#b45309", "#4338ca", "#be185d", "#4d7c0f", "#0369a1", "#7e22ce", "#b91c1c"],
    dark: ["#2dd4bf", "#fbbf24", "#a5b4fc", "#f472b6", "#a3e635", "#38bdf8", "#d8b4fe", "#fca5a5"],
};
const HEIGHT = 200;
const darkness = matchMedia("(prefers-color-scheme: dark)");

export function colour(place) {
    const palette = darkness.matches ? COLOURS.dark : COLOURS.light;
    return palette[place % palette.length];
}

/** Exponential moving average with bias correction; missing values stay missing. */
export function smooth(values, weight) {
    if (!weight) return values;
    let average = 0;
    let norm = 0;
    return values.map((value) => {
        if (value === null) return null;
        average = average * weight + (1 - weight) * value;
        norm = norm * weight + (1 - weight);
        return average / norm;
    });
}

/** Curves of several runs on one axis: [xs, values, values…], with null where one has no point. */
export function align(tables) {
    if (tables.length === 1) return [tables[0].xs, tables[0].values];
    return uPlot.join(tables.map(({ xs, values }) => [xs, values]));
}

export class Chart {
    /** `settings` is shared by all charts of a page: { smoothing, log, x, range, onZoom }. */
    constructor(name, settings) {
        this.name = name;
        this.settings = settings;
        const bytes = /_bytes(:|$)/.test(name);
        this.told = bytes ? size : number;
        this.ticked = bytes ? size : tick;
        this.plot = null;
        this.key = "";
        this.value = h("span", { class: "chart-value" });
        this.box = h("div", { class: "plot" });
        this.summary = h("p", { class: "visually-hidden" });
        this.element = h(
            "section",
            { class: "card chart", "aria-label": `Curve of ${name}` },
            h("h2", {}, h("span", { class: "chart-name" }, name), this.value),
            this.box,
            this.summary,
        );
        this.resizing = new ResizeObserver(() => this.#resize());
        this.resizing.observe(this.box);
        this.recolour = () => this.#forget();
        darkness.addEventListener("change", this.recolour);
    }

    close() {
        this.resizing.disconnect();
        darkness.removeEventListener("change", this.recolour);
        this.plot?.destroy();
    }

    /** Draws `tables`: { label, place, xs, values } of each run. */
    show(tables) {
        this.tables = tables;
        const smoothing = this.settings.smoothing;
        const drawn = [];
        for (const table of tables) {
            // Values not above zero have no logarithm.
            const values = this.settings.log ? table.values.map((v) => (v > 0 ? v : null)) : table.values;
            drawn.push({ ...table, values: smooth(values, smoothing), width: 2 });
            if (smoothing) drawn.push({ ...table, values, width: 1, faint: true });
        }
        const key = JSON.stringify([
            drawn.map(({ label, place, faint }) => [label, place, faint]),
            this.settings.log,
            this.settings.x,
        ]);
        const data = align(drawn);
        if (this.plot && key === this.key) {
            this.plot.setData(data, false);
            this.#scale();
        } else {
            this.plot?.destroy();
            this.key = key;
            this.plot = new uPlot(this.#options(drawn), data, this.box);
            this.#scale();
        }
        const last = tables.map(({ values }) => values.findLast((value) => value !== null));
        setText(this.value, last.length === 1 ? this.told(last[0]) : "");
        setText(
            this.summary,
            tables.map(({ label }, place) => `${label}: last value ${this.told(last[place]) || "none"}.`).join(" "),
        );
    }

    #scale() {
        const [xs] = this.plot.data;
        const { range } = this.settings;
        const min = range?.min ?? xs[0] ?? 0;
        const max = range?.max ?? xs.at(-1) ?? 1;
        this.plot.batch(() => {
            this.plot.setScale("x", min === max ? { min: min - 1, max: max + 1 } : { min, max });
        });
    }

    #forget() {
        if (!this.plot) return;
        this.plot.destroy();
        this.plot = null;
        this.show(this.tables);
    }

    #resize() {
        const width = this.box.clientWidth;
        if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    }

    #options(drawn) {
        const style = getComputedStyle(document.documentElement);
        const axis = {
            stroke: style.getPropertyValue("--muted").trim(),
            grid: { stroke: style.getPropertyValue("--line").trim(), width: 1 },
            ticks: { stroke: style.getPropertyValue("--line").trim(), width: 1 },
            font: "12px system-ui, sans-serif",
        };
        const time = this.settings.x === "time";
        return {
            width: this.box.clientWidth || 300,
            height: HEIGHT,
            cursor: {
                sync: { key: "gradwire" },
                drag: { x: true, y: false },
                bind: {
                    // A double click shows everything again, in every chart.
                    dblclick: () => () => this.settings.onZoom(null),
                },
            },
            legend: { show: drawn.filter(({ faint }) => !faint).length > 1, live: true },
            scales: {
                x: { time },
                y: { distr: this.settings.log ? 3 : 1 },
            },
            axes: [
                {
                    ...axis,
                    size: 34,
                    values: time
                        ? undefined
                        : (_, ticks) => ticks.map((value) => (Number.isInteger(value) ? tick(value) : "")),
                },
                { ...axis, size: this.ticked === size ? 76 : 62, values: (_, ticks) => ticks.map((value) => (value === null ? "" : this.ticked(value))) },
            ],
            series: [
                { label: time ? "time" : "step" },
                ...drawn.map(({ label, place, width, faint }) => ({
                    label,
                    stroke: faint ? `${colour(place)}55` : colour(place),
                    width,
                    spanGaps: true,
                    points: { show: drawn[0].xs.length < 30 && !faint, size: 5 },
                    value: (_, value) => (value === null ? "–" : this.told(value)),
                    class: faint ? "faint" : undefined,
                })),
            ],
            hooks: {
                setSelect: [
                    (plot) => {
                        if (plot.select.width < 4) return;
                        const min = plot.posToVal(plot.select.left, "x");
                        const max = plot.posToVal(plot.select.left + plot.select.width, "x");
                        plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
                        this.settings.onZoom({ min, max });
                    },
                ],
            },
        };
    }
}
