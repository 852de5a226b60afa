// What both pages let a person choose: the language and the colours. Kept in the browser.
import { useEffect, useState } from "preact/hooks";

export type Language = "en" | "zh";
export type Theme = "auto" | "light" | "dark";

export function useKept<T>(name: string, first: T): [T, (value: T) => void] {
  const [value, set] = useState<T>(() => {
    try {
      const text = localStorage.getItem(name);
      return text === null ? first : (JSON.parse(text) as T);
    } catch {
      return first;
    }
  });
  return [value, (next) => {
    set(() => next);
    try {
      localStorage.setItem(name, JSON.stringify(next));
    } catch {
      // A full or closed store: the choice holds until the page is left.
    }
  }];
}

const words = {
  en: { theme: "Colours", auto: "as the system", light: "light", dark: "dark", language: "Language" },
  zh: { theme: "配色", auto: "跟随系统", light: "浅色", dark: "深色", language: "语言" },
};

export function useLook() {
  const [language, setLanguage] = useKept<Language>("minicpm.language", navigator.language.startsWith("zh") ? "zh" : "en");
  const [theme, setTheme] = useKept<Theme>("minicpm.theme", "auto");
  useEffect(() => {
    document.documentElement.lang = language;
    document.documentElement.dataset.theme = theme;
  }, [language, theme]);
  const w = words[language];
  const controls = (
    <div class="look">
      <select aria-label={w.language} value={language} onChange={(e) => setLanguage(e.currentTarget.value as Language)}>
        <option value="en">English</option>
        <option value="zh">中文</option>
      </select>
      <select aria-label={w.theme} value={theme} onChange={(e) => setTheme(e.currentTarget.value as Theme)}>
        {(["auto", "light", "dark"] as const).map((name) => <option value={name}>{w[name]}</option>)}
      </select>
    </div>
  );
  return { language, theme, controls };
}
