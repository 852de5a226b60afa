// What a model writes is untrusted: only the tags of plain text pass, with no attribute that runs, loads or styles.
import DOMPurify from "dompurify";
import { marked } from "marked";
import { useMemo } from "preact/hooks";

const TAGS = "p br strong em del code pre ul ol li blockquote h3 h4 h5 h6 hr table thead tbody tr th td a".split(" ");

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("rel", "noopener noreferrer");
    node.setAttribute("target", "_blank");
  }
  // A wide block scrolls, by keyboard too.
  if (node.tagName === "PRE") node.setAttribute("tabindex", "0");
});

export function toHtml(text: string): string {
  const html = marked.parse(text, { async: false, gfm: true, breaks: true });
  // The page has the first two levels itself.
  const lowered = html.replace(/<(\/?)h([1-4])>/g, (_, slash: string, level: string) => `<${slash}h${Number(level) + 2}>`);
  return DOMPurify.sanitize(lowered, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "title"], ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i });
}

export function Markdown({ text }: { text: string }) {
  const html = useMemo(() => toHtml(text), [text]);
  return <div class="markdown" dangerouslySetInnerHTML={{ __html: html }} />;
}
