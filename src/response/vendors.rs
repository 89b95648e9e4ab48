//! What is known of vendors' errors: a row for each, with where it was read. [`classify`](super::classify) takes the first row
//! that fits. `*` in a pattern stands for any text; a message is compared from its beginning to its end.
//!
//! A row is needed only where the status says something else than the body, or says it of somebody else. Rows against a key,
//! an account or an endpoint go by a code or a type, or by words that the vendor begins its message with.

use crate::config::Trouble::{
    self, AccountLimit, CallMissing, Endpoint, Key, ModelFailure, ModelLimit, ModelMissing, ObjectMissing, Request,
};

/// One kind of error of one vendor. An empty pattern fits everything.
#[derive(Debug)]
pub(super) struct Row {
    /// Name in logs and metrics.
    pub(super) id: &'static str,
    /// Statuses; none for any.
    pub(super) statuses: &'static [u16],
    /// One of the error's codes.
    pub(super) code: &'static str,
    /// One of its types.
    pub(super) kind: &'static str,
    /// Its message.
    pub(super) message: &'static str,
    /// Whose trouble it is.
    pub(super) means: Trouble,
    /// Where it was read.
    #[cfg_attr(not(test), expect(dead_code, reason = "for readers, and a test"))]
    pub(super) source: &'static str,
    /// What it says of the time to wait, if that is not in numbers.
    pub(super) lasts: Lasts,
}

/// What a row says of the time to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lasts {
    /// As long as the answer says.
    AsSaid,
    /// A daily quota is used up, whatever shorter time the answer says.
    Day,
    /// The account's money is used up, and comes back when somebody pays or the quota turns.
    Quota,
    /// The request alone is larger than the limit: waiting does not help it, and hinders others.
    Not,
}

const ANY: &[u16] = &[];
const OPENAI: &str = "developers.openai.com/docs/guides/error-codes";
const OPENAI_SPEND: &str = "help.openai.com/en/articles/6614457";
const ANTHROPIC: &str = "docs.anthropic.com/en/api/errors";
const GOOGLE_REASONS: &str = "googleapis/googleapis google/api/error_reason.proto";
const ZHIPU: &str = "docs.bigmodel.cn/cn/api/api-code";
const MINIMAX: &str = "platform.minimax.io/docs/api-reference/errorcode";
const DASHSCOPE: &str = "help.aliyun.com/zh/model-studio/error-code";
const ARK: &str = "volcengine.com/docs/82379/1299023";
const NEW_API: &str = "QuantumNous/new-api types/error.go";
const KIMI: &str = "platform.kimi.com/docs/api/errors";
const CLOUDFLARE: &str = "developers.cloudflare.com/workers-ai/platform/errors";
const QIANFAN: &str = "ai.baidu.com/ai-doc/WENXINWORKSHOP/tlmyncueh";
const OPENROUTER: &str = "openrouter.ai/docs/api/reference/errors-and-debugging";
const WANDB: &str = "docs.wandb.ai/inference/api-reference/errors";
const BEDROCK: &str = "docs.aws.amazon.com/bedrock/latest/userguide/troubleshooting-api-error-codes.html";
const LLAMA_CPP: &str = "ggml-org/llama.cpp tools/server/server-common.cpp";

/// The table. The order matters only among rows that fit the same error.
#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    // OpenAI, and the many who copy its codes
    code("openai/invalid_api_key", ANY, "invalid_api_key", Key, OPENAI),
    code("openai/ip_not_authorized", ANY, "ip_not_authorized", Key, OPENAI),
    code("openai/unsupported_country", ANY, "unsupported_country_region_territory", Key, "songquanpeng/one-api#1692"),
    code("openai/account_deactivated", ANY, "account_deactivated", Key, OPENAI),
    code("openai/billing_not_active", ANY, "billing_not_active", Key, OPENAI).lasting(Lasts::Quota),
    code("openai/billing_hard_limit", ANY, "billing_hard_limit_reached", Key, OPENAI_SPEND).lasting(Lasts::Quota),
    code("openai/credit_exhausted", ANY, "credit_balance_exhausted", Key, OPENAI_SPEND).lasting(Lasts::Quota),
    code("openai/organization_spend", ANY, "organization_spend_limit_exceeded", Key, OPENAI_SPEND).lasting(Lasts::Quota),
    code("openai/project_spend", ANY, "project_spend_limit_exceeded", Key, OPENAI_SPEND).lasting(Lasts::Quota),
    code("openai/organization_usage", ANY, "organization_usage_limit_exceeded", Key, OPENAI_SPEND).lasting(Lasts::Quota),
    // The same code as OpenAI's, for a limit by the minute
    both("dashscope/allocated_quota", &[429], "insufficient_quota", "Allocated quota exceeded*", ModelLimit, DASHSCOPE),
    both("dashscope/token_quota", &[429], "insufficient_quota",
         "You exceeded your current quota, please check your plan and billing details.", ModelLimit, DASHSCOPE),
    code("openai/insufficient_quota", ANY, "insufficient_quota", Key, "mattvr/ShellGPT#23").lasting(Lasts::Quota),
    kind("openai/insufficient_quota_type", ANY, "insufficient_quota", Key, OPENAI_SPEND).lasting(Lasts::Quota),
    both("openai/request_over_limit", ANY, "rate_limit_exceeded", "Request too large for *", ModelLimit, "Aider-AI/aider#1880")
        .lasting(Lasts::Not),
    code("openai/rate_limit", &[413, 429, 502], "rate_limit_exceeded", ModelLimit, "continuedev/continue#10218"),
    code("openai/slow_down", ANY, "slow_down", AccountLimit, OPENAI),
    code("openai/overloaded", ANY, "server_is_overloaded", ModelFailure, OPENAI),
    code("openai/model_not_found", ANY, "model_not_found", ModelMissing, "Shopify/roast#13"),
    words("openai/model_missing", &[400, 404], "The model `*` does not exist*", ModelMissing, "Shopify/roast#13"),
    words("openai/no_access_to_model", &[403, 404], "Project `*` does not have access to model `*`*", ModelMissing, "Aider-AI/aider#1903"),
    code("openai/previous_response", ANY, "previous_response_not_found", ObjectMissing, "maximhq/bifrost#2441"),
    words("openai/previous_response_invalid", &[400], "Invalid `previous_response_id`.", ObjectMissing, "Soju06/codex-lb#1817"),
    words("openai/item_missing", &[400, 404], "Item with id '*' not found*", ObjectMissing, "can1357/oh-my-pi#41"),
    words("openai/thread_missing", &[400, 404], "No thread found with id '*'*", ObjectMissing, "FlowiseAI/Flowise#1200"),
    words("openai/assistant_missing", &[400, 404], "No assistant found with id '*'*", ObjectMissing, "flows-network/openai-assistant-telegram#1"),
    code("openai/context_length", ANY, "context_length_exceeded", Request, OPENAI),
    code("openai/content_policy", ANY, "content_policy_violation", Request, OPENAI),
    code("openai/invalid_prompt", ANY, "invalid_prompt", Request, OPENAI),
    words("openai/no_organization", &[401], "You must be a member of an organization to use the API*", Key, OPENAI),
    words("openai/overloaded_words", &[429, 503], "That model is currently overloaded with other requests.*", ModelFailure, "openai/openai-python#414"),
    words("openai/at_capacity", ANY, "Selected model is at capacity.*", ModelFailure, "openai/codex#19446"),
    // Azure
    both("azure/request_over_limit", &[429], "429", "Requests to the *Please retry after 86400 seconds*", ModelLimit, "alex-wolf-ps/dbchatprov2#2")
        .lasting(Lasts::Not),
    words("azure/key", &[401], "Access denied due to invalid subscription key or wrong API endpoint.*", Key, "microsoft/chat-copilot#738"),
    words("azure/management", &[429], "Rate limit is exceeded. Try again in *", AccountLimit, "Azure-Samples/azure-search-openai-demo#177"),
    code("azure/deployment_missing", ANY, "DeploymentNotFound", ModelMissing, "learn.microsoft.com/azure/ai-services/openai"),
    code("azure/content_filter", ANY, "content_filter", Request, "learn.microsoft.com/azure/ai-services/openai"),
    // Anthropic
    kind("anthropic/authentication", ANY, "authentication_error", Key, ANTHROPIC),
    kind("anthropic/billing", ANY, "billing_error", Key, ANTHROPIC).lasting(Lasts::Quota),
    words("anthropic/credit", &[400], "Your credit balance is too low to access the Anthropic API*", Key, "anthropics/claude-code#66314").lasting(Lasts::Quota),
    kind("anthropic/rate_limit", ANY, "rate_limit_error", ModelLimit, ANTHROPIC),
    kind("anthropic/overloaded", ANY, "overloaded_error", ModelFailure, ANTHROPIC),
    typed("anthropic/overloaded_500", &[500], "api_error", "Overloaded", ModelFailure, "anthropics/claude-code#4248"),
    typed("anthropic/model_missing", &[404], "not_found_error", "model: *", ModelMissing, ANTHROPIC),
    // Google
    code("google/api_key_invalid", ANY, "API_KEY_INVALID", Key, "can1357/oh-my-pi#449"),
    words("google/key_not_valid", &[400, 401, 403], "API key not valid. Please pass a valid API key.", Key, "continuedev/continue#10748"),
    words("google/key_expired", &[400, 401, 403], "API key expired. Please renew the API key.", Key, "continuedev/continue#11336"),
    words("google/location", &[400], "User location is not supported for the API use.", Key, "ai.google.dev/gemini-api/docs/troubleshooting"),
    code("google/service_disabled", ANY, "SERVICE_DISABLED", Key, GOOGLE_REASONS),
    code("google/billing_disabled", ANY, "BILLING_DISABLED", Key, GOOGLE_REASONS).lasting(Lasts::Quota),
    code("google/key_blocked", ANY, "API_KEY_*_BLOCKED", Key, GOOGLE_REASONS),
    code("google/consumer", ANY, "CONSUMER_*", Key, GOOGLE_REASONS),
    code("google/daily_quota", ANY, "*PerDay*", ModelLimit, "google-gemini/gemini-cli#8437").lasting(Lasts::Day),
    code("google/quota", &[429, 502], "RESOURCE_EXHAUSTED", ModelLimit, "n4ze3m/page-assist#406"),
    code("google/capacity", ANY, "MODEL_CAPACITY_EXHAUSTED", ModelFailure, "google-gemini/gemini-cli#23520"),
    words("google/model_missing", &[404], "models/* is not found for API version*", ModelMissing, "ai.google.dev/gemini-api/docs/troubleshooting"),
    words("vertex/model_missing", &[404], "Publisher Model `*` was not found*", ModelMissing, "genkit-ai/genkit#4688"),
    // Groq
    words("groq/restricted", &[400, 401, 403], "Organization has been restricted.*", Key, "kerlig.com/help/groq/troubleshooting"),
    code("groq/decommissioned", ANY, "model_decommissioned", ModelMissing, "console.groq.com/docs/deprecations"),
    // OpenRouter
    code("openrouter/flagged", ANY, "flagged_input", Request, "openrouter.ai/docs/api-reference/errors"),
    words("openrouter/daily_free", &[429], "Rate limit exceeded: free-models-per-day*", AccountLimit, "cline/cline#5301").lasting(Lasts::Day),
    words("openrouter/no_provider", &[404], "No endpoints found*", ModelMissing, "anomalyco/opencode#1558"),
    words("openrouter/no_provider_allowed", &[404], "No endpoints available*", ModelMissing, "truefoundry/models#826"),
    // Fewer tokens can still be afforded: the account is as it was, and nobody else's requests are hindered.
    words("openrouter/too_many_tokens", &[402], "This request requires more credits, or fewer max_tokens*", AccountLimit, "anomalyco/opencode#12219")
        .lasting(Lasts::Not),
    words("openrouter/too_long_prompt", &[402], "Prompt tokens limit exceeded: *", AccountLimit, "anomalyco/opencode#12219")
        .lasting(Lasts::Not),
    code("openrouter/in_flight", ANY, "openrouter_in_flight_budget", AccountLimit, OPENROUTER),
    code("openrouter/key_limit", ANY, "openrouter_key_limit", Key, OPENROUTER),
    code("openrouter/credits", ANY, "openrouter_credits", Key, OPENROUTER).lasting(Lasts::Quota),
    code("openrouter/daily_free_source", ANY, "openrouter_free_tier_daily", AccountLimit, "Avarok-Cybersecurity/atlas#543").lasting(Lasts::Day),
    kind("openrouter/payment", &[402], "payment_required", Key, OPENROUTER).lasting(Lasts::Quota),
    words("openrouter/no_user", &[401], "User not found.", Key, OPENROUTER),
    // Mistral
    words("mistral/capacity", ANY, "Service tier capacity exceeded for this model.", ModelFailure, "continuedev/continue#6185"),
    kind("mistral/rate", ANY, "rate_limited", ModelLimit, "cline/cline#9085"),
    words("mistral/requests", &[429], "Requests rate limit exceeded", AccountLimit, "dnakov/anon-kode#53"),
    code("mistral/model_invalid", &[400], "invalid_model", ModelMissing, "docs.mistral.ai/api"),
    kind("mistral/model_invalid_type", &[400], "invalid_model", ModelMissing, "docs.mistral.ai/api"),
    // xAI
    words("xai/key", &[400, 401], "Incorrect API key provided: *console.x.ai*", Key, "docs.x.ai/docs/key-information/debugging"),
    words("xai/no_credit", &[403, 429], "Your newly created team* doesn't have any credits*", Key, "continuedev/continue#12670").lasting(Lasts::Quota),
    words("xai/credit_used", &[403, 429], "Your team * has either used all available credits or reached its monthly spending limit*", Key, "continuedev/continue#10373").lasting(Lasts::Quota),
    code("xai/spending_limit", ANY, "personal-team-blocked:spending-limit", Key, "NousResearch/hermes-agent#26847").lasting(Lasts::Quota),
    // DeepSeek
    words("deepseek/key", &[401], "Authentication Fails*", Key, "api-docs.deepseek.com/quick_start/error_codes"),
    words("deepseek/balance", ANY, "Insufficient Balance", Key, "continuedev/continue#11387").lasting(Lasts::Quota),
    // Zhipu, Z.ai
    code("zhipu/key", &[401], "100*", Key, ZHIPU),
    code("zhipu/balance", &[429], "1113", Key, ZHIPU).lasting(Lasts::Quota),
    code("zhipu/account", &[429], "111*", Key, ZHIPU),
    code("zhipu/locked", &[429], "1121", Key, ZHIPU),
    code("zhipu/plan_ended", &[429], "1309", Key, ZHIPU),
    code("zhipu/model_missing", &[400, 404], "1211", ModelMissing, ZHIPU),
    code("zhipu/daily", &[429], "1304", ModelLimit, ZHIPU).lasting(Lasts::Day),
    code("zhipu/busy", &[429], "1305", ModelFailure, ZHIPU),
    code("zhipu/busy_model", &[429], "1312", ModelFailure, ZHIPU),
    code("zhipu/plan_window", &[429], "1308", AccountLimit, ZHIPU).lasting(Lasts::Day),
    code("zhipu/plan_period", &[429], "1310", AccountLimit, ZHIPU).lasting(Lasts::Day),
    code("zhipu/fair_use", &[429], "1313", AccountLimit, ZHIPU),
    code("zhipu/not_in_plan", &[429], "1311", ModelMissing, ZHIPU),
    code("zhipu/sensitive", ANY, "1301", Request, ZHIPU),
    // MiniMax answers 200 and says it in base_resp, which has no status of its own
    code("minimax/rate", &[502], "1002", ModelLimit, MINIMAX),
    code("minimax/key", &[502], "1004", Key, MINIMAX),
    code("minimax/balance", &[502], "1008", Key, MINIMAX).lasting(Lasts::Quota),
    code("minimax/input", &[502], "1026", Request, MINIMAX),
    code("minimax/output", &[502], "1027", Request, MINIMAX),
    code("minimax/tokens", &[502], "1039", ModelLimit, MINIMAX),
    code("minimax/parameters", &[502], "2013", Request, MINIMAX),
    code("minimax/invalid_key", &[502], "2049", Key, MINIMAX),
    typed("minimax/balance_500", &[500], "api_error", "insufficient balance (1008)*", Key, "MiniMax-AI/MiniMax-M2#62").lasting(Lasts::Quota),
    // Baidu Qianfan answers 200 with error_code
    code("qianfan/call", &[502], "3", CallMissing, QIANFAN),
    code("qianfan/busy", &[502], "4", ModelFailure, QIANFAN),
    code("qianfan/service_token", &[502], "13", Key, QIANFAN),
    code("qianfan/iam", &[502], "14", Key, QIANFAN),
    code("qianfan/application", &[502], "15", Key, QIANFAN),
    code("qianfan/daily", &[502], "17", ModelLimit, QIANFAN).lasting(Lasts::Day),
    code("qianfan/rate", &[502], "18", ModelLimit, QIANFAN),
    code("qianfan/total", &[502], "19", Key, QIANFAN),
    code("qianfan/token", &[502], "100", Key, QIANFAN),
    code("qianfan/token_old", &[502], "110", Key, QIANFAN),
    code("qianfan/token_expired", &[502], "111", Key, QIANFAN),
    code("qianfan/requests_minute", ANY, "336501", ModelLimit, "cloud.baidu.com/doc/WENXINWORKSHOP/s/hlzic283e"),
    code("qianfan/tokens_minute", ANY, "336502", ModelLimit, "cloud.baidu.com/doc/WENXINWORKSHOP/s/hlzic283e"),
    both("qianfan/model_denied", &[401], "invalid_model", "No permission to use the model*", ModelMissing, "ai.baidu.com/ai-doc/WENXINWORKSHOP/Cm2y4d5ha"),
    code("qianfan/parameter_denied", &[401], "no_parameter_permission", Request, "ai.baidu.com/ai-doc/WENXINWORKSHOP/Cm2y4d5ha"),
    code("qianfan/balance", ANY, "BILLING_INSUFFICIENT_BALANCE", Key, "ai.baidu.com/ai-doc/AppBuilder/4m8sgh88y").lasting(Lasts::Quota),
    code("qianfan/user_daily", ANY, "QUOTA_USER_DAILY_*", AccountLimit, "ai.baidu.com/ai-doc/AppBuilder/4m8sgh88y").lasting(Lasts::Day),
    // Alibaba DashScope
    code("dashscope/key", ANY, "InvalidApiKey", Key, DASHSCOPE),
    code("dashscope/arrears", ANY, "Arrearage", Key, DASHSCOPE),
    code("dashscope/free_tier", ANY, "AllocationQuota.FreeTierOnly", Key, DASHSCOPE),
    both("dashscope/free_gone", ANY, "Throttling.AllocationQuota", "Free allocated quota exceeded.*", ModelMissing, DASHSCOPE),
    code("dashscope/overdue", ANY, "PostpaidBillOverdue", Key, DASHSCOPE),
    code("dashscope/unpurchased", ANY, "AccessDenied.Unpurchased", ModelMissing, DASHSCOPE),
    both("dashscope/model_not_exist", &[400], "InvalidParameter", "Model not exist.*", ModelMissing, DASHSCOPE),
    code("dashscope/throttling", ANY, "Throttling*", ModelLimit, DASHSCOPE),
    code("dashscope/requests", ANY, "limit_requests", ModelLimit, DASHSCOPE),
    code("dashscope/model_missing", ANY, "ModelNotFound", ModelMissing, DASHSCOPE),
    code("dashscope/model_denied", ANY, "Model.AccessDenied", ModelMissing, DASHSCOPE),
    code("dashscope/inspection", ANY, "DataInspectionFailed", Request, DASHSCOPE),
    code("dashscope/inspection_2", ANY, "data_inspection_failed", Request, DASHSCOPE),
    // Volcengine Ark
    code("ark/key", ANY, "AuthenticationError", Key, ARK),
    code("ark/overdue", ANY, "AccountOverdueError", Key, ARK),
    code("ark/model_missing", ANY, "InvalidEndpointOrModel.NotFound", ModelMissing, ARK),
    code("ark/model_not_open", ANY, "ModelNotOpen", ModelMissing, ARK),
    code("ark/closed", ANY, "InvalidEndpoint.ClosedEndpoint", ModelFailure, ARK),
    code("ark/rate", ANY, "RateLimitExceeded.*", ModelLimit, ARK),
    code("ark/free_gone", ANY, "QuotaExceeded", ModelMissing, ARK),
    // The owner has to open the model again; others are not concerned.
    code("ark/set_limit", ANY, "SetLimitExceeded", ModelMissing, "volcengine/MineContext#328"),
    code("ark/service_overdue", ANY, "ServiceOverdue", Key, ARK),
    code("ark/service_closed", ANY, "ServiceNotOpen", ModelMissing, ARK),
    code("ark/account_rate", ANY, "*AccountRateLimitExceeded", AccountLimit, ARK),
    code("ark/account_requests", ANY, "APIAccountRpmRateLimitExceeded", AccountLimit, ARK),
    code("ark/burst", ANY, "RequestBurstTooFast", ModelLimit, ARK),
    code("ark/overloaded", ANY, "ServerOverloaded", ModelFailure, ARK),
    code("ark/sensitive", ANY, "*SensitiveContentDetected*", Request, ARK),
    code("ark/risk", ANY, "Input*RiskDetection", Request, "volcengine.com/docs/82379/1099476"),
    // Moonshot, Kimi
    kind("moonshot/balance", ANY, "exceeded_current_quota_error", Key, "MoonshotAI/Kimi-K2#5").lasting(Lasts::Quota),
    kind("moonshot/key", ANY, "invalid_authentication_error", Key, KIMI),
    kind("moonshot/incorrect_key", ANY, "incorrect_api_key_error", Key, KIMI),
    kind("moonshot/rate", ANY, "rate_limit_reached_error", AccountLimit, "harry0703/MoneyPrinterTurbo#339"),
    kind("moonshot/overloaded", ANY, "engine_overloaded_error", ModelFailure, KIMI),
    kind("moonshot/filter", ANY, "content_filter", Request, KIMI),
    // Cerebras
    code("cerebras/queue", ANY, "queue_exceeded", ModelFailure, "continuedev/continue#9800"),
    code("cerebras/quota", ANY, "*_quota_exceeded", ModelLimit, "nminaya/grammar-nazi-bot#958"),
    // SiliconFlow
    code("siliconflow/model_missing", &[400], "20012", ModelMissing, "anyme123/Any-code#1"),
    words("siliconflow/model_missing_words", &[400], "Model does not exist. Please check it carefully.", ModelMissing, "anyme123/Any-code#1"),
    code("siliconflow/balance", &[403], "30001", Key, "docs.siliconflow.cn/faqs/error-code").lasting(Lasts::Quota),
    // Cloudflare Workers AI
    code("cloudflare/model_missing", &[400], "5007", ModelMissing, CLOUDFLARE),
    code("cloudflare/model_invalid", &[404], "3042", ModelMissing, CLOUDFLARE),
    code("cloudflare/model_denied", &[403], "5018", ModelMissing, CLOUDFLARE),
    code("cloudflare/model_private", &[403], "3041", ModelMissing, CLOUDFLARE),
    code("cloudflare/terms", &[403], "5016", ModelMissing, CLOUDFLARE),
    code("cloudflare/account", &[403], "3023", Key, CLOUDFLARE),
    code("cloudflare/daily", &[429], "3036", AccountLimit, CLOUDFLARE).lasting(Lasts::Day),
    code("cloudflare/daily_2", &[429], "4006", AccountLimit, "get-engram/engram#34").lasting(Lasts::Day),
    code("cloudflare/capacity", &[429], "3040", ModelFailure, CLOUDFLARE),
    // NVIDIA
    words("nvidia/degraded", &[400], "Function id '*': DEGRADED function cannot be invoked*", ModelFailure, "decolua/9router#2527"),
    words("nvidia/model_missing", &[404], "Function '*': Not found for account '*'*", ModelMissing, "NVIDIA-AI-Blueprints/rag#44"),
    words("nvidia/credit", &[402], "Account '*': Cloud credits expired*", Key, "docs.nvidia.com/nim").lasting(Lasts::Quota),
    words("siliconflow/rate", &[429], "Request was rejected due to rate limiting*", ModelLimit, "AIDotNet/OpenDeepWiki#269"),
    // Others that say what the status does not
    code("novita/balance", ANY, "NOT_ENOUGH_BALANCE", Key, "novita.ai/docs/api-reference/basic-error-code").lasting(Lasts::Quota),
    code("novita/key", ANY, "INVALID_API_KEY", Key, "novita.ai/docs/api-reference/basic-error-code"),
    code("novita/model_missing", ANY, "MODEL_NOT_FOUND", ModelMissing, "novita.ai/docs/api-reference/basic-error-code"),
    code("zenmux/no_credit", ANY, "insufficient_credit", Key, "docs.zenmux.ai/guide/advanced/error-codes").lasting(Lasts::Quota),
    kind("zenmux/safety", &[403], "safety_check_failed", Request, "docs.zenmux.ai/guide/advanced/error-codes"),
    kind("zenmux/model_missing", ANY, "invalid_model", ModelMissing, "docs.zenmux.ai/guide/advanced/error-codes"),
    words("together/context", &[403], "Input token count + max_tokens parameter must be less than the context length*", Request, "docs.together.ai/docs/error-codes"),
    code("github/daily", &[429], "RateLimitReached", ModelLimit, "docs.github.com/github-models"),
    code("github/busy", &[429], "rate_limited", AccountLimit, "microsoft/vscode-copilot-release#5795"),
    words("fireworks/suspended", &[412], "Account * is suspended*", Key, "docs.fireworks.ai/troubleshooting/status_error_codes"),
    words("wandb/quota", &[402], "You exceeded your current quota, please check your plan and billing details*", Key, WANDB).lasting(Lasts::Quota),
    words("wandb/concurrency", &[429], "Concurrency limit reached for requests*", AccountLimit, WANDB),
    words("huggingface/credit", &[402], "You have exceeded your monthly included credits*", Key, "huggingface/agents-course#386").lasting(Lasts::Quota),
    words("chutes/balance", &[402, 429], "Quota exceeded and account balance is *", Key, "DaWe35/image-router#33").lasting(Lasts::Quota),
    words("together/dedicated", &[400], "Unable to access non-serverless model *", ModelMissing, "docs.together.ai/docs/error-codes"),
    words("bedrock/no_access", &[403], "You don't have access to the model with the specified model ID.*", ModelMissing, BEDROCK),
    code("bedrock/form", ANY, "FTUFormNotFilled", ModelMissing, BEDROCK),
    code("bedrock/signature", ANY, "*IncompleteSignature", Key, BEDROCK),
    words("bedrock/on_demand", &[400], "Invocation of model ID * with on-demand throughput isn*", ModelMissing, "strands-agents/docs#102"),
    words("tencent/signature", ANY, "The provided credentials could not be validated.*", Key, "tencentcloud.com/document/api/1284/75543"),
    // Servers that people run themselves
    words("ollama/model_missing", &[404], "model * not found, try pulling it first", ModelMissing, "ollama/ollama#2203"),
    words("ollama/model_missing_2", &[404], "model * not found", ModelMissing, "ollama/ollama server/routes.go"),
    words("ollama/memory", &[500], "model requires more system memory (*", ModelFailure, "continuedev/continue#11715"),
    words("ollama/busy", &[503], "server busy, please try again.  maximum pending requests exceeded", ModelFailure, "ollama/ollama server/sched.go"),
    words("vllm/lora_missing", &[404], "The lora adapter `*` does not exist*", ModelMissing, "vllm-project/vllm entrypoints/openai"),
    kind("llamacpp/not_supported", &[501], "not_supported_error", CallMissing, LLAMA_CPP),
    kind("llamacpp/loading", &[503], "unavailable_error", ModelFailure, LLAMA_CPP),
    kind("llamacpp/context", ANY, "exceed_context_size_error", Request, LLAMA_CPP),
    words("lmstudio/not_loaded", &[400, 404], "No models loaded. Please load a model*", ModelMissing, "lmstudio-ai/lmstudio-bug-tracker#1492"),
    words("lmstudio/load", ANY, "Failed to load model*", ModelFailure, "lmstudio-ai/lmstudio-bug-tracker#1492"),
    words("lmstudio/no_call", ANY, "Unexpected endpoint or method. (*", CallMissing, "lmstudio-ai/lmstudio-bug-tracker#239"),
    kind("tgi/overloaded", ANY, "overloaded", ModelFailure, "huggingface/text-generation-inference router/src"),
    kind("tgi/validation", ANY, "validation", Request, "huggingface/text-generation-inference router/src"),
    // Relays
    kind("litellm/budget", ANY, "budget_exceeded", Key, "BerriAI/litellm#20615"),
    words("litellm/model_invalid", &[400], "/*: Invalid model name passed in model=*", ModelMissing, "BerriAI/litellm litellm/proxy"),
    code("litellm/model_denied", ANY, "key_model_access_denied", ModelMissing, "BerriAI/litellm litellm/proxy"),
    words("litellm/cooling", &[429], "No deployments available for selected model*", ModelFailure, "BerriAI/litellm litellm/types/router.py"),
    words("litellm/unhealthy", ANY, "There are no healthy deployments*", ModelFailure, "BerriAI/litellm litellm/router.py"),
    kind("new-api/quota", &[403], "insufficient_user_quota", Key, NEW_API).lasting(Lasts::Quota),
    code("new-api/quota_code", ANY, "insufficient_user_quota", Key, NEW_API).lasting(Lasts::Quota),
    code("new-api/token_quota", ANY, "pre_consume_token_quota_failed", Key, NEW_API).lasting(Lasts::Quota),
    code("new-api/channel", ANY, "channel:*", ModelFailure, NEW_API),
    code("new-api/sensitive", ANY, "sensitive_words_detected", Request, NEW_API),
    code("new-api/blocked", ANY, "prompt_blocked", Request, NEW_API),
    typed("one-api/no_channel", &[503], "one_api_error", "当前分组 * 无可用渠道*", ModelMissing, "songquanpeng/one-api#2340"),
    code("relay/balance", ANY, "INSUFFICIENT_BALANCE", Key, "Wei-Shaw/sub2api#890").lasting(Lasts::Quota),
    code("relay/balance_lower", ANY, "insufficient_balance", Key, "docs.laozhang.ai/en/faq/balance-insufficient").lasting(Lasts::Quota),
    // Amazon Bedrock
    code("bedrock/throttling", ANY, "*ThrottlingException", ModelLimit, "docs.aws.amazon.com/bedrock/latest/APIReference"),
    code("bedrock/not_ready", ANY, "*ModelNotReadyException", ModelFailure, "docs.aws.amazon.com/bedrock/latest/APIReference"),
    // A page of a firewall or gateway before the endpoint, not of the API
    words("page/forbidden", &[403], "<!DOCTYPE*", Endpoint, "cloudflare/cloudflare-docs#8066"),
    words("page/forbidden_2", &[403], "<html*", Endpoint, "cloudflare/cloudflare-docs#8066"),
    words("page/forbidden_3", &[403], "<!doctype*", Endpoint, "cloudflare/cloudflare-docs#8066"),
    words("page/cloudflare", &[403], "error code: 1*", Endpoint, "cloudflare/cloudflare-docs#8066"),
];

impl Row {
    const fn lasting(self, lasts: Lasts) -> Self {
        Self { lasts, ..self }
    }
}

/// An error with this code.
const fn code(
    id: &'static str,
    statuses: &'static [u16],
    code: &'static str,
    means: Trouble,
    source: &'static str,
) -> Row {
    Row { id, statuses, code, kind: "", message: "", means, source, lasts: Lasts::AsSaid }
}

/// An error of this type.
const fn kind(
    id: &'static str,
    statuses: &'static [u16],
    kind: &'static str,
    means: Trouble,
    source: &'static str,
) -> Row {
    Row { kind, ..code(id, statuses, "", means, source) }
}

/// An error with these words.
const fn words(
    id: &'static str,
    statuses: &'static [u16],
    message: &'static str,
    means: Trouble,
    source: &'static str,
) -> Row {
    Row { message, ..code(id, statuses, "", means, source) }
}

/// An error with this code and these words.
const fn both(
    id: &'static str,
    statuses: &'static [u16],
    code_is: &'static str,
    message: &'static str,
    means: Trouble,
    source: &'static str,
) -> Row {
    Row { message, ..code(id, statuses, code_is, means, source) }
}

/// An error of this type with these words.
const fn typed(
    id: &'static str,
    statuses: &'static [u16],
    kind_is: &'static str,
    message: &'static str,
    means: Trouble,
    source: &'static str,
) -> Row {
    Row { message, ..kind(id, statuses, kind_is, means, source) }
}
