// Numbers and times as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
    if (!Number.isFinite(bytes)) return "";
    let unit = 0;
    while (bytes >= 1024 && unit + 1 < UNITS.length) {
        bytes /= 1024;
        unit += 1;
    }
    return `${unit ? bytes.toFixed(1) : bytes} ${UNITS[unit]}`;
}

export function number(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "";
    const magnitude = Math.abs(value);
    if (Number.isInteger(value) && magnitude < 1e7) return value.toLocaleString("en");
    if (magnitude !== 0 && (magnitude < 1e-3 || magnitude >= 1e7)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
}

/** As `number`, short enough for an axis. */
export function tick(value) {
    return Math.abs(value) >= 10_000 && Math.abs(value) < 1e15 ? COMPACT.format(value) : number(value);
}

const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

export function milliseconds(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "";
    if (value >= 60_000) return `${(value / 60_000).toFixed(1)} min`;
    if (value >= 1000) return `${(value / 1000).toFixed(value >= 10_000 ? 0 : 1)} s`;
    return `${value >= 10 ? Math.round(value) : value.toFixed(1)} ms`;
}

export function duration(seconds) {
    if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
    if (seconds < 129_600) return `${Math.round(seconds / 3600)} h`;
    return `${Math.round(seconds / 86_400)} days`;
}

export function ago(timeS) {
    return `${duration(Date.now() / 1000 - timeS)} ago`;
}

export function date(timeS) {
    return new Date(timeS * 1000).toLocaleString();
}

export function rate(stepsPerSecond) {
    if (stepsPerSecond === null || stepsPerSecond === undefined) return "–";
    if (stepsPerSecond === 0) return "0";
    return stepsPerSecond >= 1 ? `${number(stepsPerSecond)} /s` : `${number(stepsPerSecond * 60)} /min`;
}
