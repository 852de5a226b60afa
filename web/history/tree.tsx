// The run, what it came from and what began in it, as nested lists: a screen reader's tree without a script of its own.
import type { Branch } from "./api";
import type { Words } from "./words";

export function Tree({ branches, own, w }: { branches: Branch[]; own: string; w: Words }) {
  const names = new Set(branches.map((b) => b.name));
  const below = (parent: string | null, depth: number) => {
    const children = branches.filter((b) => (parent === null ? b.parent === null || !names.has(b.parent) : b.parent === parent));
    if (!children.length || depth > 20) return null;
    return (
      <ul>
        {children.map((b) => (
          <li>
            <strong>{b.name}</strong>{b.name === own && <span class="tag">{w.this}</span>}
            <span class="soft">{b.parent && ` ${b.parent}@${b.begin} →`} {w.reaches} {b.last?.toLocaleString() ?? "–"}{b.stage && `, ${w[b.stage as "stable"] ?? b.stage}`}{b.loss !== null && `, ${w.train} ${b.loss.toFixed(3)}`}</span>
            {below(b.name, depth + 1)}
          </li>
        ))}
      </ul>
    );
  };
  return <section class="card tree" aria-label={w.branches}><h2>{w.branches}</h2>{below(null, 0)}</section>;
}
