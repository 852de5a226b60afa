// The page of a server with a key: argv[6] opens it.
import { open, picture, run } from "./session.mjs";

const url = process.argv[4];
const key = process.argv[6];

await run(async () => {
  const facts = {};
  // What the browser is asked for when the page itself is behind the key, and what it is answered.
  const blank = await open({ httpCredentials: { username: "me", password: "a-wrong-one" } });
  facts.refused = (await blank.goto(url)).status();
  facts.refusal = await blank.textContent("body");

  const page = await open({ httpCredentials: { username: "me", password: key } });
  facts.opened = (await page.goto(url)).status();
  await page.getByLabel("Longest reply (tokens)").fill("8");
  await page.getByRole("textbox", { name: "Message" }).fill("Hello");
  await page.keyboard.press("Enter");
  await page.locator(".turn.assistant .note").waitFor();
  facts.reply = await page.locator(".turn.assistant .markdown").textContent();
  facts.asked = await page.getByLabel("API key").count();
  const kept = (p) => p.evaluate((k) => [localStorage, sessionStorage].map((store) => JSON.stringify(store).includes(k)), key);
  facts.keptByBrowser = await kept(page);

  // Where only the page comes without the key, as from a proxy that serves it, the page asks.
  const isPage = (at) => at.pathname === "/" || at.pathname.startsWith("/assets/");
  const own = await open({}, (p) => p.route(isPage, (route) =>
    route.continue({ headers: { ...route.request().headers(), authorization: `Bearer ${key}` } })));
  const box = own.getByLabel("API key");
  await box.waitFor();
  facts.silent = await own.getByRole("alert").count();
  await box.fill("not-the-key-at-all");
  await box.blur();
  await own.getByRole("alert").waitFor();
  facts.wrong = await own.getByRole("alert").textContent();
  await picture(own, "wrong-key");
  await box.fill(key);
  await box.blur();
  await own.locator(".model-card strong", { hasNotText: "…" }).waitFor();
  facts.alerts = await own.getByRole("alert").count();
  await own.getByLabel("Longest reply (tokens)").fill("8");
  await own.getByRole("textbox", { name: "Message" }).fill("Hello");
  await own.keyboard.press("Enter");
  await own.locator(".turn.assistant .note").waitFor();
  facts.ownReply = await own.locator(".turn.assistant .markdown").textContent();
  facts.kept = await kept(own);
  await own.reload();
  await own.locator(".model-card strong", { hasNotText: "…" }).waitFor();
  facts.remembered = true;
  // Another tab does not know it.
  const tab = await own.context().newPage();
  await tab.goto(`${url}/health`);
  facts.other = await tab.evaluate(() => sessionStorage.length);
  return facts;
});
