// A browser for one test: `open` gives a page that is watched; `finish` says what was seen.
import { createRequire } from "node:module";

const [, , web, chromium, url, pictures] = process.argv;
const require = createRequire(`${web}/package.json`);
const { chromium: browserType } = require("playwright-core");
const axe = require("axe-core");
const seen = { foreign: [], errors: [], axe: [] };
const browser = await browserType.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-dev-shm-usage"] });

// `prepare` is given the page before it loads anything.
export async function open(options = {}, prepare = async () => {}) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, locale: "en-GB", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  page.on("request", (r) => { if (!r.url().startsWith(url) && !r.url().startsWith("data:")) seen.foreign.push(r.url()); });
  page.on("console", (m) => { if (m.type() === "error") seen.errors.push(m.text()); });
  page.on("pageerror", (e) => seen.errors.push(String(e)));
  await prepare(page);
  await page.goto(url);
  return page;
}

export async function checkAccess(page, where) {
  // Evaluated by the debugger, which the page's policy does not bind.
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => window.axe.run());
  for (const v of violations) seen.axe.push(`${where}: ${v.id}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200)).join(" | ")}`);
}

export const picture = (page, name, options = {}) => page.screenshot({ path: `${pictures}/${name}.png`, ...options });

export async function finish(facts) {
  await browser.close();
  console.log(JSON.stringify({ ...seen, ...facts }));
}

export async function run(steps) {
  try {
    await finish(await steps());
  } catch (error) {
    for (const context of browser.contexts()) for (const page of context.pages()) await picture(page, "failed").catch(() => {});
    console.error(error);
    await browser.close();
    process.exit(1);
  }
}
