import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { useKept, useLook } from "../shared/look";
import "../shared/style.css";
import { type Model, models, Refused, type Settings } from "./api";
import "./chat.css";
import { Message } from "./message";
import { Panel } from "./panel";
import { useConversations } from "./talk";
import { words } from "./words";

const FIRST: Settings = { system: "", temperature: 0.7, topP: 0.9, maxTokens: 512, seed: "", logprobs: false };
const NEAR_END_PIXELS = 250;

function App() {
  const { language, controls } = useLook();
  const w = words[language];
  const [settings, setSettings] = useKept<Settings>("minicpm.settings", FIRST);
  const [model, setModel] = useState<Model | null>(null);
  const [key, setKey] = useState(() => sessionStorage.getItem("minicpm.key") ?? "");
  const [needsKey, setNeedsKey] = useState(false);
  const [draft, setDraft] = useState("");
  const [trouble, setTrouble] = useState("");
  const list = useRef<HTMLDivElement>(null);
  const tell = (error: Error | null) => {
    const isKey = error instanceof Refused && error.status === 401;
    if (isKey) setNeedsKey(true);
    setTrouble(!error || (isKey && !key) ? "" : isKey ? w.keyWrong : `${w.failed}: ${error.message}`);
  };
  const talk = useConversations(w, tell);

  useEffect(() => { document.title = w.title; }, [w]);
  useEffect(() => {
    models(key).then((found) => { setModel(found[0] ?? null); setTrouble(""); }).catch(tell);
  }, [key]);
  const turns = talk.current.turns;
  useEffect(() => {
    const box = list.current;
    // Who has scrolled up to read is left there.
    if (box && box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PIXELS) box.scrollTop = box.scrollHeight;
  }, [turns]);

  const ask = (kept: number, text?: string) => talk.reply(kept, text, model?.id ?? "", settings, key);
  const send = () => {
    if (!draft.trim() || talk.isBusy) return;
    ask(turns.length, draft.trim());
    setDraft("");
  };
  return (
    <div class="chat">
      <header>
        <h1>{w.title}</h1>
        {controls}
      </header>
      <nav aria-label={w.chats}>
        <button class="main" onClick={talk.start} disabled={talk.isBusy}>{w.fresh}</button>
        <ul>
          {talk.all.map((c) => (
            <li key={c.id}>
              <button class="pick" aria-current={c.id === talk.current.id ? "true" : undefined} disabled={talk.isBusy} onClick={() => talk.choose(c.id)}>{c.title || w.untitled}</button>
              <button aria-label={`${w.remove}: ${c.title || w.untitled}`} disabled={talk.isBusy} onClick={() => talk.remove(c.id)}>×</button>
            </li>
          ))}
        </ul>
      </nav>
      <main>
        <div class="turns" ref={list} tabIndex={0} role="group" aria-label={w.chats}>
          {turns.length === 0 && <p class="soft empty">{w.empty}</p>}
          {turns.map((turn, index) => (
            <Message key={`${talk.current.id}-${index}`} turn={turn} w={w} isBusy={talk.isBusy} isLast={index === turns.length - 1} showTokens={settings.logprobs}
              onEdit={(text) => ask(index, text)} onAgain={() => ask(index)} />
          ))}
        </div>
        {trouble && <p class="bad" role="alert">{trouble}</p>}
        {talk.isFull && <p class="bad" role="alert">{w.full}</p>}
        <p class="unseen" role="status">{talk.isBusy ? w.writing : turns.length ? w.done : ""}</p>
        <form class="composer" onSubmit={(e) => { e.preventDefault(); send(); }}>
          <textarea aria-label={w.message} placeholder={w.hint} rows={2} value={draft} onInput={(e) => setDraft(e.currentTarget.value)}
            onKeyDown={(e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } }} />
          {talk.isBusy ? <button type="button" onClick={talk.stop}>{w.stop}</button> : <button class="main" disabled={!draft.trim()}>{w.send}</button>}
        </form>
      </main>
      <Panel w={w} settings={settings} onSettings={setSettings} model={model} needsKey={needsKey} apiKey={key}
        onKey={(next) => { sessionStorage.setItem("minicpm.key", next); setKey(next); }} />
    </div>
  );
}

render(<App />, document.getElementById("app")!);
