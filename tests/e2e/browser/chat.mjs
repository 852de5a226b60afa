import { checkAccess, open, picture, run } from "./session.mjs";

const HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><svg onload="window.hit=1"></svg><iframe src="https://example.org/"></iframe>'
  + '[link](javascript:window.hit=1) <a href="javascript:window.hit=1" onclick="window.hit=1">b</a>\n\n![p](https://example.org/p.png)\n\n**bold**\n\n```js\nlet a = "<b>";\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n';

await run(async () => {
  const page = await open();
  const facts = {};
  const box = page.getByRole("textbox", { name: "Message" });
  const idle = () => page.getByRole("button", { name: "Send", exact: true }).waitFor();
  const replies = page.locator(".turn.assistant");
  await page.locator(".model-card strong", { hasNotText: "…" }).waitFor();
  facts.card = await page.locator(".model-card").textContent();
  await page.getByLabel("Temperature").fill("0");
  await page.getByLabel("System prompt").fill("You answer shortly.");
  await page.getByLabel("Longest reply (tokens)").fill("400");
  await box.fill("Write a long story about the sea and its many islands.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector(".turn.assistant .markdown")?.textContent.length > 20);
  facts.streamed = (await replies.last().locator(".markdown").textContent()).length;
  await page.getByRole("button", { name: "Stop" }).click();
  await idle();
  facts.stopped = await replies.last().locator(".note").textContent();
  facts.stoppedText = await replies.last().locator(".markdown").textContent();
  await page.getByLabel("Longest reply (tokens)").fill("24");
  await page.getByLabel("Show how likely each token was").check();
  await page.getByRole("button", { name: "Regenerate" }).click();
  await page.locator(".turn.assistant .note", { hasText: "cut at" }).waitFor();
  await idle();
  facts.again = await replies.last().locator(".markdown").textContent();
  facts.note = await replies.last().locator(".note").textContent();
  facts.tokens = await replies.last().locator(".token").count();
  await replies.last().locator(".token").nth(1).hover();
  facts.hovered = await replies.last().locator(".token-detail").textContent();
  await replies.last().locator(".tokens").focus();
  await page.keyboard.press("ArrowRight");
  facts.moved = await replies.last().locator(".token-detail").textContent();
  await page.getByRole("button", { name: "Edit" }).click();
  await page.getByRole("textbox", { name: "Edit" }).fill("What is the capital of France?");
  await page.getByRole("button", { name: "Save and send" }).click();
  await page.locator(".turn.user", { hasText: "France" }).waitFor();
  await page.locator(".turn.assistant .note").waitFor();
  await idle();
  facts.edited = await page.locator(".turn").allTextContents();
  await checkAccess(page, "a conversation");
  await picture(page, "chat");
  await page.reload();
  await replies.last().waitFor();
  facts.reloaded = await page.locator(".turn").allTextContents();
  await page.getByLabel("Show how likely each token was").uncheck();

  await page.route("**/v1/chat/completions", (route) => {
    const chunk = (delta, end) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason: end }] })}\n\n`;
    route.fulfill({ contentType: "text/event-stream", body: chunk({ role: "assistant", content: HOSTILE }, null) + chunk({}, "stop") + "data: [DONE]\n\n" });
  });
  await page.getByRole("button", { name: "New conversation" }).click();
  await box.fill("Be evil");
  await page.keyboard.press("Enter");
  await page.locator(".markdown table").waitFor();
  await page.waitForTimeout(300);
  facts.hit = await page.evaluate(() => window.hit ?? null);
  facts.hostile = await replies.last().locator(".markdown").innerHTML();
  await page.unroute("**/v1/chat/completions");
  facts.conversations = await page.locator("nav li").count();

  await page.getByLabel("Language").selectOption("zh");
  await page.getByLabel("配色").selectOption("dark");
  facts.chinese = await page.getByRole("button", { name: "新对话" }).count();
  await page.waitForTimeout(200);
  await checkAccess(page, "Chinese, dark");
  await picture(page, "dark");

  await page.route("**/v1/models", (route) => route.request().headers().authorization === "Bearer mine" ? route.continue() : route.fulfill({ status: 401, json: { error: { message: "no key" } } }));
  await page.reload();
  await page.getByLabel("API 密钥").fill("mine");
  await page.getByLabel("API 密钥").blur();
  await page.locator(".model-card strong", { hasNotText: "…" }).waitFor();
  facts.keyed = await page.evaluate(() => [localStorage, sessionStorage].map((store) => JSON.stringify(store).includes("mine")));
  return facts;
});
