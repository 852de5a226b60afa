// Layers down, checkpoints across; drawn on a canvas, so that 600 checkpoints cost no more elements than six.
import { useEffect, useRef } from "preact/hooks";
import type { Layers } from "./api";

export type Measure = "norm" | "change" | "cosine";
interface Props { label: string; measure: Measure; steps: number[]; found: Map<number, Layers>; version: number; rows: string[]; chosen: number[]; low: string; high: string; onPick: (step: number) => void }

export function valueOf(layers: Layers, row: number, measure: Measure): number | null {
  const layer = layers.layers[row];
  if (!layer || (measure !== "norm" && layers.previous === null)) return null;
  const value = layer[measure];
  return value === null ? null : measure === "cosine" ? 1 - value : value;
}

// Viridis at five places.
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function colour(share: number): string {
  const at = Math.max(0, Math.min(0.9999, share)) * 4;
  const [a, b] = [COLOURS[Math.floor(at)], COLOURS[Math.floor(at) + 1]];
  return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * (at % 1))).join(",")})`;
}

export function Heatmap({ label, measure, steps, found, version, rows, chosen, low, high, onPick }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const range = useRef<[number, number]>([0, 0]);
  const spans = rows.map((_, row) => {
    const values = [...found.values()].map((l) => valueOf(l, row, measure)).filter((v): v is number => v !== null && v > 0);
    return values.length ? [Math.min(...values), Math.max(...values)] : [Infinity, 0];
  });
  range.current = [Math.min(...spans.map((s) => s[0])), Math.max(...spans.map((s) => s[1]))];
  useEffect(() => {
    const c = canvas.current;
    const paint = c?.getContext("2d");
    if (!c || !paint) return;
    const cell = Math.max(1, Math.floor(1200 / steps.length));
    c.width = cell * steps.length;
    c.height = rows.length * 12;
    const [least, most] = range.current.map(Math.log);
    steps.forEach((step, column) => {
      const layers = found.get(step);
      if (layers) rows.forEach((_, row) => {
        const value = valueOf(layers, row, measure);
        if (value === null) return;
        // Sizes differ by orders of magnitude: the scale is logarithmic.
        paint.fillStyle = colour(value > 0 ? (Math.log(value) - least) / (most - least || 1) : 0);
        paint.fillRect(column * cell, row * 12, cell, 12);
      });
    });
    paint.fillStyle = "#ff3b6b";
    for (const step of chosen) paint.fillRect(steps.indexOf(step) * cell + Math.floor((cell - 1) / 2), 0, Math.max(2, cell / 12), c.height);
  }, [version, steps, chosen.join(), measure]);
  const [least, most] = range.current;
  return (
    <figure class="heat">
      <figcaption>{label}</figcaption>
      <div class="heat-body">
        <ol aria-hidden="true" class="soft">{rows.map((name, i) => <li>{rows.length < 16 || i % Math.ceil(rows.length / 12) === 0 ? name : ""}</li>)}</ol>
        <canvas ref={canvas} role="img" aria-label={label} onClick={(e) => {
          const box = e.currentTarget.getBoundingClientRect();
          onPick(steps[Math.max(0, Math.min(steps.length - 1, Math.floor(((e.clientX - box.left) / box.width) * steps.length)))]);
        }} />
      </div>
      {most > 0 && <p class="soft scale"><span>{low} {least.toPrecision(3)}</span><i aria-hidden="true" /><span>{high} {most.toPrecision(3)}</span></p>}
    </figure>
  );
}
