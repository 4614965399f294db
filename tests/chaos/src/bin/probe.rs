//! Answers questions about the network it runs in; see `reknit_chaos::probe`.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use reknit_chaos::probe::{ANSWER_WITHIN, Answer, DATAGRAMS, Leadership, Numbered, Question};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What the questions share.
struct Probe {
    /// Connections to coordinators, which are opened again when they end.
    channels: Mutex<BTreeMap<String, Channel>>,
    datagrams: Option<UdpSocket>,
    heard: Mutex<Vec<String>>,
}

fn main() -> Result<(), Failure> {
    let datagrams = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, DATAGRAMS)).ok();
    let probe = Arc::new(Probe { channels: Mutex::default(), datagrams, heard: Mutex::default() });
    let listener = Arc::clone(&probe);
    std::thread::spawn(move || listener.listen());
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(async {
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while let Some(line) = lines.next_line().await? {
            let Numbered { number, what } = serde_json::from_str(&line)?;
            let probe = Arc::clone(&probe);
            tokio::spawn(async move {
                let what = match tokio::time::timeout(ANSWER_WITHIN, probe.answer(what)).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(why)) => Answer::Failed(why.to_string()),
                    Err(_) => Answer::Failed("no answer in time".to_owned()),
                };
                if let Ok(mut line) = serde_json::to_vec(&Numbered { number, what }) {
                    line.push(b'\n');
                    // Nobody may want it any more.
                    let _ = std::io::stdout().lock().write_all(&line);
                }
            });
        }
        Ok(())
    })
}

impl Probe {
    fn listen(&self) {
        let mut buffer = [0; 1500];
        while let Some(Ok((length, _))) = self.datagrams.as_ref().map(|socket| socket.recv_from(&mut buffer))
        {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        }
    }

    async fn answer(&self, question: Question) -> Result<Answer, Failure> {
        match question {
            Question::Coordinator { url } => {
                let mut client = InspectClient::new(self.channel(&url)?);
                let says = client.server(v1::ServerRequest {}).await?.into_inner();
                let v1::ServerStatus { role, leader, epoch, store_transactions, .. } = says;
                Ok(Answer::Coordinator(Leadership { role, leader, epoch, store_transactions }))
            }
            Question::Post { to, path, body } => Ok(Answer::Body(post(&to, &path, &body).await?)),
            Question::Send { to, text } => {
                self.datagrams.as_ref().ok_or("no socket")?.send_to(text.as_bytes(), to)?;
                Ok(Answer::Sent)
            }
            Question::Heard => {
                Ok(Answer::Heard(self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()))
            }
        }
    }

    fn channel(&self, url: &str) -> Result<Channel, Failure> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(url) {
            return Ok(channel.clone());
        }
        // A connection that was cut silently is given up soon.
        let endpoint = Endpoint::from_shared(url.to_owned())?
            .connect_timeout(ANSWER_WITHIN)
            .http2_keep_alive_interval(ANSWER_WITHIN)
            .keep_alive_timeout(ANSWER_WITHIN)
            .keep_alive_while_idle(true);
        Ok(channels.entry(url.to_owned()).or_insert(endpoint.connect_lazy()).clone())
    }
}

/// What an HTTP server answers to this, if it is content.
async fn post(to: &str, path: &str, body: &str) -> Result<String, Failure> {
    let mut stream = TcpStream::connect(to).await?;
    let length = body.len();
    // By the old version, so that it ends with the connection.
    let request = format!(
        "POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await?;
    let (head, body) = reply.split_once("\r\n\r\n").ok_or("no HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status == "200" { Ok(body.to_owned()) } else { Err(format!("{status}: {body}").into()) }
}
