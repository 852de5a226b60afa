// One page a build: PAGE=chat or PAGE=history. File names hold a hash of the content, so servers may keep them for ever.
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

const rooms: Record<string, string> = { chat: "serve", history: "history" };
const page = process.env.PAGE ?? "";
if (!(page in rooms)) throw new Error(`PAGE must be one of ${Object.keys(rooms).join(", ")}, got '${page}'`);
const at = (path: string) => fileURLToPath(new URL(path, import.meta.url));

export default defineConfig({
  root: at(page),
  base: "/",
  build: {
    outDir: at(`../src/minicpm/${rooms[page]}/static`),
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
});
