import { checkAccess, open, picture, run } from "./session.mjs";

await run(async () => {
  const page = await open();
  const slider = page.getByRole("slider");
  await slider.waitFor();
  const count = Number(await slider.getAttribute("max")) + 1;
  await page.waitForFunction((n) => document.querySelector(".computed")?.textContent.startsWith(`${n} / `), count, { timeout: 120_000 });
  const stepNow = () => slider.getAttribute("aria-valuetext");
  const facts = { count, last: await stepNow(), curves: await page.locator(".chart path.curve").count(), stages: await page.locator(".chart").first().locator(".stage").count(),
    scores: await page.locator('section[aria-label="Scores"] figcaption').allTextContents(), bars: await page.locator(".chart .error").count() };
  await slider.focus();
  await page.keyboard.press("Home");
  facts.home = await stepNow();
  await page.keyboard.press("ArrowRight");
  facts.right = await stepNow();
  await page.keyboard.press("PageUp");
  facts.pageUp = await stepNow();
  await page.keyboard.press("End");
  facts.end = await stepNow();
  const view = page.locator(".step").first();
  await view.locator(".samples li").first().waitFor();
  facts.samples = await view.locator(".samples li").allTextContents();
  facts.table = await view.locator("tbody tr").allTextContents();
  facts.colours = await page.locator(".heat canvas").evaluateAll((all) => all.map((c) => {
    const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    const found = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3]) found.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
    return found.size;
  }));
  facts.branches = await page.locator(".tree li > strong").allTextContents();
  await page.getByText("Manifest", { exact: true }).first().click();
  facts.manifest = await view.locator(".facts").textContent();
  await page.getByLabel("Compare with").selectOption({ index: 1 });
  await page.waitForFunction(() => document.querySelectorAll(".step tbody").length === 2);
  facts.compared = await page.locator(".step h2").allTextContents();
  await checkAccess(page, "two steps");
  await picture(page, "compared", { fullPage: true });
  await page.getByLabel("Compare with").selectOption("");
  if (process.argv[6] === "generate") {
    await page.getByRole("button", { name: "Generate from these weights" }).click();
    await page.waitForFunction((old) => document.querySelector(".step .samples li")?.textContent !== old, facts.samples[0]);
    facts.made = await view.locator(".samples li").allTextContents();
  }
  await page.getByText("Manifest", { exact: true }).first().click();
  await picture(page, "history", { fullPage: true });
  await page.locator(".chart svg").first().click({ position: { x: 70, y: 50 } });
  facts.picked = await stepNow();
  await page.getByLabel("Language").selectOption("zh");
  await page.getByLabel("配色").selectOption("dark");
  facts.chinese = await page.locator("h2").last().textContent();
  await page.waitForTimeout(300);
  await checkAccess(page, "Chinese, dark");
  await picture(page, "dark", { fullPage: true });
  return facts;
});
