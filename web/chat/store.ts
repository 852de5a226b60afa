// Conversations in this browser's own store; nothing of them is sent anywhere but to the model.
import type { Turn } from "./api";

export interface Conversation { id: string; title: string; turns: Turn[] }
const PLACE = "minicpm.conversations";

export function load(): Conversation[] {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    return Array.isArray(kept) ? kept.filter((c) => typeof c?.id === "string" && Array.isArray(c.turns)) : [];
  } catch {
    return [];
  }
}

/** Returns whether the store took it. */
export function keep(conversations: Conversation[]): boolean {
  try {
    localStorage.setItem(PLACE, JSON.stringify(conversations.filter((c) => c.turns.length)));
    return true;
  } catch {
    return false;
  }
}

export function fresh(): Conversation {
  // randomUUID is missing where the page came over plain http from another machine.
  const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
  return { id, title: "", turns: [] };
}
