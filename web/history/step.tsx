// One checkpoint looked at: where it stands, its samples, its layers, its manifest.
import { useEffect, useState } from "preact/hooks";
import { get, type Layers, type Manifest, type Row, type Samples } from "./api";
import { valueOf } from "./heatmap";
import type { Words } from "./words";

interface Props { row: Row; w: Words; layers: Layers | undefined; canGenerate: boolean }

export function StepView({ row, w, layers, canGenerate }: Props) {
  const [samples, setSamples] = useState<Samples | null>(null);
  const [manifest, setManifest] = useState<Manifest | null>(null);
  const [trouble, setTrouble] = useState("");
  const [isMaking, setMaking] = useState(false);
  useEffect(() => {
    const control = new AbortController();
    setTrouble("");
    // The slider passes many steps; only where it rests is asked for.
    const timer = setTimeout(() => {
      Promise.all([get<Samples>(`/api/samples?step=${row.step}`, control.signal), get<Manifest>(`/api/manifest?step=${row.step}`, control.signal)])
        .then(([s, m]) => { setSamples(s); setManifest(m); })
        .catch((error: Error) => { if (!control.signal.aborted) setTrouble(error.message); });
    }, 120);
    return () => { clearTimeout(timer); control.abort(); };
  }, [row.step]);
  const make = () => {
    const step = row.step;
    setMaking(true);
    get<Samples>(`/api/generate?step=${step}`).then((s) => { if (step === row.step) setSamples(s); }).catch((e: Error) => setTrouble(e.message)).finally(() => setMaking(false));
  };
  const facts: [string, string][] = manifest ? [
    [w.step, manifest.step.toLocaleString()], [w.tokens, manifest.tokens.toLocaleString()], [w.stage, manifest.stage], [w.lr, manifest.lr.toPrecision(3)],
    [w.batch, String(manifest.batch_sequences)], [w.seed, String(manifest.seed)], [w.parent, manifest.parent ?? w.none], [w.bytes, manifest.bytes.toLocaleString()], [w.hash, manifest.manifest_sha256],
    ...Object.entries(manifest.losses).map(([name, value]): [string, string] => [name, value.toPrecision(6)]),
  ] : [];
  return (
    <section class="card step" aria-label={`${w.at} ${row.step}`}>
      <h2>{w.step} {row.step.toLocaleString()} <span class={`tag ${row.stage}`}>{w[row.stage as "stable"] ?? row.stage}</span></h2>
      <p class="soft">{row.tokens.toLocaleString()} {w.tokens} · lr {row.lr.toPrecision(3)}{row.losses.train !== undefined && <> · {w.train} {row.losses.train.toFixed(4)}</>}</p>
      {trouble && <p class="bad" role="alert">{w.failed}: {trouble}</p>}
      <div class="row"><h3>{w.samples}</h3>
        {samples && samples.step !== null && <span class="soft">{w.made} {samples.step}</span>}
        {canGenerate && <button disabled={isMaking} onClick={make}>{isMaking ? w.making : w.make}</button>}
      </div>
      {samples?.samples.length ? <ul class="samples">{samples.samples.map((s) => <li><b>{s.prompt}</b>{s.text}</li>)}</ul> : <p class="soft">{w.nothing}</p>}
      <h3>{w.layers}</h3>
      {layers && layers.step === row.step ? (
        <table>
          <thead><tr><th scope="col">{w.layer}</th><th scope="col">{w.norm}</th><th scope="col">{w.change}</th><th scope="col">{w.cosine}</th></tr></thead>
          <tbody>{layers.layers.map((l, i) => <tr><th scope="row">{l.name}</th>{(["norm", "change", "cosine"] as const).map((m) => <td>{valueOf(layers, i, m)?.toPrecision(3) ?? "–"}</td>)}</tr>)}</tbody>
        </table>
      ) : <p class="soft">{w.loading}</p>}
      <details><summary>{w.manifest}</summary>
        <dl class="facts">{facts.map(([name, value]) => <><dt>{name}</dt><dd>{value}</dd></>)}</dl>
        <details><summary>{manifest?.tensors.length ?? 0} {w.tensors}</summary>
          <ul class="tensors">{manifest?.tensors.map((t) => <li><code>{t.name}</code> {t.type} {t.shape.join("×")} <code class="soft">{t.sha256.slice(0, 16)}…</code></li>)}</ul>
        </details>
      </details>
    </section>
  );
}
