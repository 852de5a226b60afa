// Layers of every checkpoint, one request after the other: what is looked at first, then the rest in order.
import { useEffect, useRef, useState } from "preact/hooks";
import { get, type Layers } from "./api";

export function useLayers(steps: number[], chosen: number[]) {
  const found = useRef(new Map<number, Layers>());
  const wanted = useRef(chosen);
  const [version, setVersion] = useState(0);
  const [trouble, setTrouble] = useState("");
  wanted.current = chosen;
  useEffect(() => {
    const control = new AbortController();
    const failed = new Set<number>();
    const isOpen = (step: number) => !found.current.has(step) && !failed.has(step);
    const run = async () => {
      for (;;) {
        const step = wanted.current.find(isOpen) ?? steps.find(isOpen);
        if (step === undefined) return;
        try {
          found.current.set(step, await get<Layers>(`/api/layers?step=${step}`, control.signal));
          if (found.current.size % 5 === 0 || found.current.size === steps.length || wanted.current.includes(step)) setVersion(found.current.size);
        } catch (error) {
          if (control.signal.aborted) return;
          failed.add(step);
          setTrouble((error as Error).message);
        }
      }
    };
    void run();
    return () => control.abort();
  }, [steps]);
  return { found: found.current, version, trouble };
}
