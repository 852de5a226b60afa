// The conversations and the one reply that may be under way.
import { useRef, useState } from "preact/hooks";
import { complete, type Settings, type Turn } from "./api";
import { type Conversation, fresh, keep, load } from "./store";
import type { Words } from "./words";

const TITLE_CHARACTERS = 40;

export function useConversations(w: Words, onTrouble: (error: Error | null) => void) {
  const [all, setAll] = useState<Conversation[]>(() => {
    const kept = load();
    return kept.length ? kept : [fresh()];
  });
  const [id, setId] = useState(all[0].id);
  const [isBusy, setBusy] = useState(false);
  const [isFull, setFull] = useState(false);
  const running = useRef<AbortController | null>(null);
  const latest = useRef(all);
  const current = all.find((c) => c.id === id) ?? all[0];

  const put = (next: Conversation[], isKept = true) => {
    latest.current = next.length ? next : [fresh()];
    setAll(latest.current);
    if (isKept) setFull(!keep(latest.current));
  };
  const update = (turns: Turn[], isKept: boolean) => {
    const title = (turns[0]?.content ?? "").replace(/\s+/g, " ").slice(0, TITLE_CHARACTERS);
    put(latest.current.map((c) => (c.id === current.id ? { ...c, turns, title } : c)), isKept);
  };

  /** Keeps the first `kept` turns, adds `text` as the person's if there is one, and has the model answer. */
  async function reply(kept: number, text: string | undefined, model: string, settings: Settings, key: string) {
    if (running.current) return;
    const turns: Turn[] = current.turns.slice(0, kept);
    if (text !== undefined) turns.push({ role: "user", content: text });
    const answer: Turn = { role: "assistant", content: "", tokens: [] };
    const control = (running.current = new AbortController());
    setBusy(true);
    onTrouble(null);
    const begun = performance.now();
    let first = 0;
    let count = 0;
    let end = "";
    update(turns, true);
    try {
      for await (const delta of complete(model, turns, settings, key, control.signal)) {
        if (delta.text && !first) first = performance.now();
        answer.content += delta.text;
        answer.tokens!.push(...delta.tokens);
        count = delta.usage ?? count + (delta.text ? 1 : 0);
        if (delta.end === "length") end = w.cut;
        update([...turns, { ...answer }], false);
      }
    } catch (error) {
      if (control.signal.aborted) end = w.stopped;
      else onTrouble(error as Error);
    }
    if (answer.content || end) {
      const seconds = (performance.now() - first) / 1000;
      const pace = count > 1 && first ? `${((count - 1) / seconds).toFixed(1)} ${w.speed} · ` : "";
      answer.note = `${pace}${count} ${w.tokens}${first ? ` · ${w.first} ${((first - begun) / 1000).toFixed(2)} s` : ""}${end ? ` · ${end}` : ""}`;
      update([...turns, answer], true);
    } else update(turns, true);
    running.current = null;
    setBusy(false);
  }

  return {
    all, current, isBusy, isFull, reply,
    stop: () => running.current?.abort(),
    choose: setId,
    start: () => {
      const empty = latest.current.find((c) => !c.turns.length) ?? fresh();
      put([empty, ...latest.current.filter((c) => c !== empty)]);
      setId(empty.id);
    },
    remove: (gone: string) => {
      put(latest.current.filter((c) => c.id !== gone));
      if (gone === id) setId(latest.current[0].id);
    },
  };
}
