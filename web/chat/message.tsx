import { useState } from "preact/hooks";
import type { Turn } from "./api";
import { Markdown } from "./markdown";
import { Tokens } from "./tokens";
import type { Words } from "./words";

interface Props { turn: Turn; w: Words; isBusy: boolean; isLast: boolean; showTokens: boolean; onEdit: (text: string) => void; onAgain: () => void }

export function Message({ turn, w, isBusy, isLast, showTokens, onEdit, onAgain }: Props) {
  const [draft, setDraft] = useState<string | null>(null);
  const isOwn = turn.role === "user";
  return (
    <article class={`turn ${turn.role}`}>
      <h2 class="unseen">{isOwn ? w.you : w.assistant}</h2>
      {draft !== null ? (
        <form onSubmit={(e) => { e.preventDefault(); if (draft.trim()) { onEdit(draft); setDraft(null); } }}>
          <textarea aria-label={w.edit} rows={3} value={draft} onInput={(e) => setDraft(e.currentTarget.value)} />
          <div class="row">
            <button class="main" disabled={isBusy}>{w.save}</button>
            <button type="button" onClick={() => setDraft(null)}>{w.cancel}</button>
          </div>
        </form>
      ) : isOwn ? <div class="own-text">{turn.content}</div> : <Markdown text={turn.content} />}
      {showTokens && turn.tokens && turn.tokens.length > 0 && <Tokens tokens={turn.tokens} w={w} />}
      {draft === null && (
        <div class="row under soft">
          {turn.note && <span class="note">{turn.note}</span>}
          {isOwn && <button disabled={isBusy} onClick={() => setDraft(turn.content)}>{w.edit}</button>}
          {!isOwn && isLast && <button disabled={isBusy} onClick={onAgain}>{w.again}</button>}
        </div>
      )}
    </article>
  );
}
