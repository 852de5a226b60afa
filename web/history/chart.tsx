// One curve over the steps, the stages shaded behind it, the chosen steps as lines.
import { useMemo } from "preact/hooks";

const WIDTH = 1000, HEIGHT = 190, LEFT = 62, BOTTOM = 24, TOP = 10, RIGHT = 12;

export interface Stage { name: string; first: number; last: number; label: string }
interface Props { label: string; points: [number, number][]; last: number; stages: Stage[]; marks: number[]; isMarked?: boolean; errors?: (number | null)[]; onPick: (step: number) => void }

export function Chart({ label, points, last, stages, marks, isMarked, errors, onPick }: Props) {
  const [low, high] = useMemo(() => {
    const values = points.flatMap((p, i) => [p[1] - (errors?.[i] ?? 0), p[1] + (errors?.[i] ?? 0)]).sort((a, b) => a - b);
    // The first losses would squeeze the rest.
    const top = values[errors ? values.length - 1 : Math.min(values.length - 1, Math.floor(values.length * 0.98))] ?? 1;
    const bottom = values[0] ?? 0;
    const room = (top - bottom || Math.abs(top) || 1) * 0.06;
    return [bottom - room, top + room];
  }, [points, errors]);
  const x = (step: number) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / Math.max(last, 1);
  const y = (value: number) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (Math.min(value, high) - low) / (high - low));
  const path = points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const ticks = [0, 1, 2, 3, 4].map((i) => low + ((high - low) * (i + 0.5)) / 5);
  const steps = [0, 0.25, 0.5, 0.75, 1].map((f) => Math.round(last * f));
  const pick = (event: MouseEvent) => {
    const box = (event.currentTarget as SVGElement).getBoundingClientRect();
    onPick(((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT)) * last);
  };
  const summary = points.length ? `${label}: ${points[0][1].toPrecision(4)} … ${points[points.length - 1][1].toPrecision(4)}` : label;
  return (
    <figure class="chart">
      <figcaption>{label}</figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={summary} onClick={pick}>
        {stages.map((s) => (
          <g>
            <rect class={`stage ${s.name}`} x={x(s.first)} y={TOP} width={Math.max(x(s.last) - x(s.first), 1)} height={HEIGHT - TOP - BOTTOM} />
            {x(s.last) - x(s.first) > 64 && <text class="axis" x={x(s.first) + 5} y={TOP + 14}>{s.label}</text>}
          </g>
        ))}
        {ticks.map((t) => <g><line class="grid" x1={LEFT} x2={WIDTH - RIGHT} y1={y(t)} y2={y(t)} /><text class="axis" text-anchor="end" x={LEFT - 6} y={y(t) + 4}>{Number(t.toPrecision(3))}</text></g>)}
        {steps.map((s) => <text class="axis" text-anchor={s === last && last ? "end" : "middle"} x={x(s)} y={HEIGHT - 6}>{s.toLocaleString()}</text>)}
        {points.map(([step, value], i) => errors?.[i] && <line class="error" x1={x(step)} x2={x(step)} y1={y(value - errors[i]!)} y2={y(value + errors[i]!)} />)}
        <path class="curve" d={path} />
        {isMarked && points.map(([step, value]) => <circle class="dot" cx={x(step)} cy={y(value)} r={3} />)}
        {marks.map((m, i) => <line class={`mark m${i}`} x1={x(m)} x2={x(m)} y1={TOP} y2={HEIGHT - BOTTOM} />)}
      </svg>
    </figure>
  );
}
