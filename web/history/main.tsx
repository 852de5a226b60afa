import { render } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { useLook } from "../shared/look";
import "../shared/style.css";
import { get, type Run } from "./api";
import { Chart, type Stage } from "./chart";
import { Heatmap } from "./heatmap";
import "./history.css";
import { useLayers } from "./layers";
import { StepView } from "./step";
import { Tree } from "./tree";
import { type Words, words } from "./words";

function App() {
  const { language, controls } = useLook();
  const w = words[language];
  const [run, setRun] = useState<Run | null>(null);
  const [trouble, setTrouble] = useState("");
  useEffect(() => { get<Run>("/api/run").then(setRun).catch((e: Error) => setTrouble(e.message)); }, []);
  useEffect(() => { document.title = `${run?.name ?? "minicpm"} · ${w.title}`; }, [run, w]);
  return (
    <>
      <header>
        <h1>{run?.name ?? "minicpm"} <span class="soft">{w.title}</span></h1>
        {run && <span class="soft">{run.checkpoints.length} {w.checkpoints} · {(run.num_parameters / 1e6).toPrecision(3)} M {w.parameters}</span>}
        {controls}
      </header>
      <main>
        {trouble && <p class="bad" role="alert">{w.failed}: {trouble}</p>}
        {!run ? !trouble && <p>{w.loading}</p> : run.checkpoints.length > 0 ? <Page run={run} w={w} /> : <p>0 {w.checkpoints}</p>}
      </main>
    </>
  );
}

function Page({ run, w }: { run: Run; w: Words }) {
  const rows = run.checkpoints;
  const steps = useMemo(() => rows.map((r) => r.step), [rows]);
  const [at, setAt] = useState(rows.length - 1);
  const [other, setOther] = useState<number | null>(null);
  const chosen = other === null ? [steps[at]] : [steps[at], steps[other]];
  const layers = useLayers(steps, chosen);
  const nearest = (step: number) => steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
  const pick = (step: number) => setAt(nearest(step));
  const stages = useMemo(() => stagesOf(run), [run]).map((s) => ({ ...s, label: w[s.name as "stable"] ?? s.name }));
  const curves = useMemo(() => ({
    loss: run.train.map((r): [number, number] => [r[0], r[1]]),
    rate: run.train.filter((r) => r[2] !== null).map((r): [number, number] => [r[0], r[2]!]),
  }), [run]);
  const scores = useMemo(() => run.scores.map((s) => ({
    label: s.label, points: s.points.map((p): [number, number] => [p[0], p[1]]), errors: s.points.map((p) => p[2]),
  })), [run]);
  const last = Math.max(steps[steps.length - 1], run.train[run.train.length - 1]?.[0] ?? 0);
  const common = { last, stages, marks: chosen, onPick: pick };
  const names = layers.found.get(steps[at])?.layers ?? [...layers.found.values()][0]?.layers ?? [];
  const maps = { steps, found: layers.found, version: layers.version, rows: names.map((l) => l.name), chosen, low: w.low, high: w.high, onPick: pick };
  return (
    <>
      <section class="card" aria-label={w.curves}>
        {curves.loss.length > 0 && <Chart label={w.loss} points={curves.loss} {...common} />}
        {run.heldout.length > 0 && <Chart label={w.bits} points={run.heldout} isMarked={run.heldout.length < 100} {...common} />}
        {curves.rate.length > 0 && <Chart label={w.rate} points={curves.rate} {...common} />}
      </section>
      {scores.length > 0 && (
        <section class="card" aria-label={w.scores}>
          <h2>{w.scores}</h2>
          {scores.map((s) => <Chart key={s.label} label={`${s.label}, ${w.error}`} points={s.points} errors={s.errors} isMarked {...common} />)}
        </section>
      )}
      <section class="card slider" aria-label={w.slider}>
        <label>{w.slider} <output>{steps[at].toLocaleString()}</output>
          <input type="range" min={0} max={rows.length - 1} value={at} aria-valuetext={`${w.step} ${steps[at]}, ${rows[at].stage}`} aria-describedby="keys"
            onInput={(e) => setAt(e.currentTarget.valueAsNumber)}
            onKeyDown={(e) => {
              const jump = { PageUp: 10, PageDown: -10 }[e.key];
              if (jump) { e.preventDefault(); setAt(Math.max(0, Math.min(rows.length - 1, at + jump))); }
            }} />
        </label>
        <label>{w.with} <select value={other ?? ""} onChange={(e) => setOther(e.currentTarget.value === "" ? null : Number(e.currentTarget.value))}>
          <option value="">{w.none}</option>
          {rows.map((r, i) => <option value={i}>{r.step}</option>)}
        </select></label>
        <p class="soft" id="keys">{w.keys}</p>
      </section>
      <div class={other === null ? "steps" : "steps two"}>
        <StepView row={rows[at]} w={w} layers={layers.found.get(steps[at])} canGenerate={run.can_generate} />
        {other !== null && <StepView row={rows[other]} w={w} layers={layers.found.get(steps[other])} canGenerate={run.can_generate} />}
      </div>
      <section class="card" aria-label={w.layers}>
        <div class="row"><h2>{w.layers}</h2><span class="soft computed">{layers.found.size} / {steps.length} {w.computed}</span></div>
        {layers.trouble && <p class="bad" role="alert">{w.failed}: {layers.trouble}</p>}
        <Heatmap label={w.norms} measure="norm" {...maps} />
        <Heatmap label={w.changes} measure="change" {...maps} />
        <Heatmap label={w.cosines} measure="cosine" {...maps} />
      </section>
      <Tree branches={run.branches} own={run.name} w={w} />
    </>
  );
}

// From the updates' own records, else from the checkpoints.
function stagesOf(run: Run): Stage[] {
  const marks: [number, string][] = run.train.some((r) => r[3]) ? run.train.map((r) => [r[0], r[3] ?? ""]) : run.checkpoints.map((r) => [r.step, r.stage]);
  const found: Stage[] = [];
  for (const [step, name] of marks) {
    const now = found[found.length - 1];
    if (now?.name === name) now.last = step;
    else found.push({ name, first: now?.last ?? 0, last: step, label: name });
  }
  return found;
}

render(<App />, document.getElementById("app")!);
