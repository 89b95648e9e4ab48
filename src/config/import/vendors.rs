//! Base URLs of vendors that other programs know by name: their APIs in OpenAI's format.

/// Vendor's name in LiteLLM, its base URL, and the variable that its key is taken from.
const VENDORS: [(&str, &str, &str); 24] = [
    ("openai", "https://api.openai.com", "OPENAI_API_KEY"),
    ("anthropic", "https://api.anthropic.com", "ANTHROPIC_API_KEY"),
    ("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    ("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    ("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY"),
    ("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    ("mistral", "https://api.mistral.ai", "MISTRAL_API_KEY"),
    ("codestral", "https://codestral.mistral.ai", "CODESTRAL_API_KEY"),
    ("together_ai", "https://api.together.xyz", "TOGETHERAI_API_KEY"),
    ("fireworks_ai", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    ("xai", "https://api.x.ai", "XAI_API_KEY"),
    ("perplexity", "https://api.perplexity.ai", "PERPLEXITYAI_API_KEY"),
    ("cerebras", "https://api.cerebras.ai", "CEREBRAS_API_KEY"),
    ("deepinfra", "https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    ("nvidia_nim", "https://integrate.api.nvidia.com", "NVIDIA_NIM_API_KEY"),
    ("sambanova", "https://api.sambanova.ai", "SAMBANOVA_API_KEY"),
    ("dashscope", "https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    ("moonshot", "https://api.moonshot.cn", "MOONSHOT_API_KEY"),
    ("volcengine", "https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE_API_KEY"),
    ("zai", "https://open.bigmodel.cn/api/paas/v4", "ZAI_API_KEY"),
    ("siliconflow", "https://api.siliconflow.cn", "SILICONFLOW_API_KEY"),
    ("github", "https://models.github.ai/inference", "GITHUB_API_KEY"),
    ("ollama", "http://localhost:11434", "OLLAMA_API_KEY"),
    ("lm_studio", "http://localhost:1234", "LM_STUDIO_API_KEY"),
];

/// Vendors whose APIs have no version in their paths.
const WITHOUT_VERSION: [&str; 1] = ["https://api.perplexity.ai"];

/// Returns a vendor's base URL, and the variable of its key.
pub(super) fn of_name(name: &str) -> Option<(&'static str, &'static str)> {
    let name = match name {
        "text-completion-openai" => "openai",
        "ollama_chat" => "ollama",
        other => other,
    };
    VENDORS.iter().find(|(known, ..)| *known == name).map(|(_, url, variable)| (*url, *variable))
}

/// Returns the base URL that a type of one-api's channels stands for: of the types that mean the same in its descendants, too.
pub(super) fn of_channel_type(number: i64) -> Option<&'static str> {
    let name = match number {
        1 => "openai",
        14 => "anthropic",
        17 => "dashscope",
        20 => "openrouter",
        24 => "gemini",
        25 => "moonshot",
        29 => "groq",
        30 => "ollama",
        _ => return None,
    };
    of_name(name).map(|(url, _)| url)
}

/// Returns a channel's base URL as ours: theirs is what stands before `/v1`, and the hosts of some vendors stand for a path of
/// their own.
pub(super) fn of_channel(theirs: &str) -> String {
    let (host, path) = theirs
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('/'))
        .map_or((theirs, ""), |(_, path)| (theirs.strip_suffix(path).unwrap_or(theirs), path));
    let bare = host.trim_end_matches('/');
    if path.is_empty() {
        let is_same = |url: &str| url.strip_prefix(bare).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        return VENDORS.iter().map(|(_, url, _)| *url).find(|url| is_same(url)).unwrap_or(theirs).to_owned();
    }
    let has_version = path
        .split('/')
        .any(|part| part.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())));
    if has_version { theirs.to_owned() } else { format!("{theirs}/v1") }
}

/// True if the API at a base URL has no version in its paths.
pub(super) fn is_without_version(base_url: &str) -> bool {
    WITHOUT_VERSION.contains(&base_url)
}
