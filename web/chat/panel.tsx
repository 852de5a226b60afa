// How replies are drawn, which model answers, and the key where one is asked for.
import type { Model, Settings } from "./api";
import type { Words } from "./words";

interface Props { w: Words; settings: Settings; onSettings: (s: Settings) => void; model: Model | null; needsKey: boolean; apiKey: string; onKey: (key: string) => void }

export function Panel({ w, settings, onSettings, model, needsKey, apiKey, onKey }: Props) {
  const set = (change: Partial<Settings>) => onSettings({ ...settings, ...change });
  const count = Number(model?.meta?.num_parameters);
  const types = model?.meta?.dtypes;
  const number = (label: string, value: number, range: [number, number, number], store: (n: number) => void) => (
    <label>{label}
      <input type="number" min={range[0]} max={range[1]} step={range[2]} value={value}
        onInput={(e) => { const n = e.currentTarget.valueAsNumber; if (n >= range[0] && n <= range[1]) store(n); }} />
    </label>
  );
  return (
    <aside class="panel" aria-label={w.settings}>
      {needsKey && (
        <label class="key">{w.key}
          <input type="password" autocomplete="off" value={apiKey} onChange={(e) => onKey(e.currentTarget.value)} />
          <span class="soft">{w.keyAsked}</span>
        </label>
      )}
      <h2>{w.model}</h2>
      <dl class="model-card">
        <dt class="unseen">{w.model}</dt><dd><strong>{model?.id ?? "…"}</strong></dd>
        {count > 0 && <><dt>{w.parameters}</dt><dd>{(count / 1e6).toFixed(0)} M</dd></>}
        {model?.max_model_len && <><dt>{w.context}</dt><dd>{model.max_model_len.toLocaleString()} {w.tokens}</dd></>}
        {Array.isArray(types) && <><dt>dtype</dt><dd>{types.join(", ")}</dd></>}
      </dl>
      <h2>{w.settings}</h2>
      <label>{w.system}<textarea rows={3} value={settings.system} onInput={(e) => set({ system: e.currentTarget.value })} /></label>
      {number(w.temperature, settings.temperature, [0, 2, 0.1], (temperature) => set({ temperature }))}
      {number(w.topP, settings.topP, [0.05, 1, 0.05], (topP) => set({ topP }))}
      {number(w.maxTokens, settings.maxTokens, [1, 100000, 1], (maxTokens) => set({ maxTokens }))}
      <label>{w.seed}<input inputMode="numeric" pattern="[0-9]*" value={settings.seed} onInput={(e) => set({ seed: e.currentTarget.value.replace(/\D/g, "").slice(0, 9) })} /></label>
      <label class="check"><input type="checkbox" checked={settings.logprobs} onChange={(e) => set({ logprobs: e.currentTarget.checked })} /> {w.logprobs}</label>
    </aside>
  );
}
