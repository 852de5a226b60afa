export const words = {
  en: {
    title: "minicpm chat", chats: "Conversations", fresh: "New conversation", remove: "Delete", untitled: "Untitled",
    message: "Message", send: "Send", stop: "Stop", again: "Regenerate", edit: "Edit", save: "Save and send", cancel: "Cancel",
    settings: "Settings", system: "System prompt", temperature: "Temperature", topP: "Top-p", maxTokens: "Longest reply (tokens)",
    seed: "Seed (empty: another each time)", logprobs: "Show how likely each token was", key: "API key",
    keyAsked: "This server asks for a key. It stays in this browser tab.", keyWrong: "The server refused this key.", model: "Model", context: "Context", parameters: "Parameters",
    you: "You", assistant: "Assistant", speed: "tokens/s", tokens: "tokens", first: "first after",
    hint: "Enter sends, Shift+Enter makes a new line", tokenHint: "Tokens of the reply: point at one, or use the arrow keys",
    empty: "Ask something. Conversations stay in this browser.", failed: "The request failed", stopped: "stopped", cut: "cut at the token limit",
    full: "The browser's store is full: this conversation is not kept. Delete older ones.", writing: "The reply is being written", done: "The reply is complete", otherwise: "alternatives",
  },
  zh: {
    title: "minicpm 对话", chats: "对话列表", fresh: "新对话", remove: "删除", untitled: "未命名",
    message: "消息", send: "发送", stop: "停止", again: "重新生成", edit: "编辑", save: "保存并发送", cancel: "取消",
    settings: "设置", system: "系统提示词", temperature: "温度", topP: "Top-p", maxTokens: "回复最大长度（词元）",
    seed: "随机种子（空：每次不同）", logprobs: "显示每个词元的概率", key: "API 密钥",
    keyAsked: "此服务器需要密钥。密钥只保存在本标签页。", keyWrong: "服务器拒绝了此密钥。", model: "模型", context: "上下文", parameters: "参数量",
    you: "你", assistant: "助手", speed: "词元/秒", tokens: "词元", first: "首词延迟",
    hint: "回车发送，Shift+回车换行", tokenHint: "回复的词元：指向其一，或用方向键",
    empty: "请提问。对话保存在本浏览器中。", failed: "请求失败", stopped: "已停止", cut: "达到词元上限",
    full: "浏览器存储已满：此对话未保存。请删除旧对话。", writing: "正在生成回复", done: "回复完成", otherwise: "其他候选",
  },
};
export type Words = (typeof words)["en"];
